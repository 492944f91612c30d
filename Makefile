# make demo   a WAV from a text prompt, offline, with the weights in this repository
# make test   lint and all tests
PYTHON ?= python3
PROMPT ?= a slow deep flute plays a rising melody, with drums
PY := .venv/bin/python

.PHONY: demo test lint clean

demo: .venv/ready
	$(PY) sample.py "$(PROMPT)" --out demo.wav

test: lint
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check .

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv cache runs
