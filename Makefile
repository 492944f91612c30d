# make demo   a WAV from a text prompt, offline, with the weights in this repository
# make test   lint and all tests
# make mistakes   plants the mistakes of study/mistakes.md, each of which a test must catch
PYTHON ?= python3
PROMPT ?= a slow deep flute plays a rising melody, with drums
PY := .venv/bin/python

.PHONY: demo test lint mistakes clean

demo: .venv/ready
	$(PY) sample.py "$(PROMPT)" --out demo.wav

test: lint
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m study map --check

mistakes: .venv/ready
	$(PY) -m study mistakes

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv cache runs
