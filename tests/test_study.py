"""The claims about study/, in the order of its README. That every mistake is caught takes minutes: `make mistakes`."""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import soundfile
import torch

import masking
import train
from encodec_wrap import load_codec
from sample import SamplingConfig, generate
from study import ROOT, check, exercises, mine, mistakes, paper, watch
from study.paper import Function, functions

PROMPT = "a slow deep flute </script>"
SPAN_MASK = """
import torch
from masking import spans_from_starts

def span_mask(n_spans, n_frames, span_len, generator=None):
    noise = torch.rand(len(n_spans), n_frames, generator=generator)
    starts = noise.argsort(dim=1).argsort(dim=1) < n_spans.clamp(min=1)[:, None]
    {}
"""
WRONG = {  # a wrong end of it: words of what `check` says
    "return starts": "not single tokens",
    "return torch.stack([starts.roll(i, 1) for i in range(span_len)]).any(0)": "does not go on at the beginning",
    "hidden = spans_from_starts(starts, span_len); hidden[:, -1] = False; return hidden": "also the last one",
    "return starts[:, 'x']": "your line   span_mask.py, line 8:  return starts[:, 'x']",
}


@pytest.fixture
def my(tmp_path):
    """my(name, source) -> a folder for functions of mine, with this one in it."""
    def write(name, source):
        folder = tmp_path / "my own functions"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
        return folder
    return write


def first_failure(name, folder=None):
    return next(filter(None, check.run_examples(exercises.BOOK[name].function, folder)), None)


def test_paper_map_is_complete_and_the_readme_is_as_it_writes_it():
    found = functions()
    assert paper.faults(found) == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper.written(readme, found) == readme, "python -m study map --write"
    assert paper.written(readme.replace("Eq. 7: ", "Eq. 7 is "), found) == readme, "a stale table is made new"


def test_paper_map_names_a_tag_that_is_no_part_of_the_paper_and_a_tagged_function_without_a_test():
    found = {name: function for name, function in functions().items() if name == "masking.span_mask"}
    odd = Function("masking", "f", ast.parse("def f():\n    '[Eq. 99] Nothing.'").body[0])
    lines = "\n".join(paper.faults(found | {"masking.f": odd}))
    assert "masking.f: its docstring's [Eq. 99] is no part of the paper" in lines
    assert "masking.f: has the tag [Eq. 99] and no test" in lines and "masking.span_mask" not in lines


@pytest.mark.parametrize("name", exercises.BOOK)
def test_an_exercises_examples_hold_for_ours(name):
    assert first_failure(name) is None


def test_there_are_20_to_30_exercises_with_three_claims_and_three_hints_each():
    assert 20 <= len(exercises.EXERCISES) <= 30
    for exercise in exercises.EXERCISES.values():
        n_tests = len([test for test in exercise.function.tests if not test.is_reference])
        assert len(exercise.hints) == 3 and len(exercise.examples) + n_tests >= 3 and exercise.place, exercise.name


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_start_writes_the_signature_and_an_example_but_no_solution_and_never_overwrites(name, tmp_path):
    exercise, path = exercises.EXERCISES[name], tmp_path / f"{name}.py"
    exercises.start([name], tmp_path)
    text = path.read_text()
    assert ">>>" in text and "is yours to write" in text and exercises.state(exercise, tmp_path) == "begun"
    compile(text, name, "exec")
    assert exercises.source(exercise.function).splitlines()[-1].strip() not in map(str.strip, text.splitlines())
    with pytest.raises(ValueError, match="is there already"):
        exercises.start([name], tmp_path)
    assert path.read_text() == text


def test_hint_gives_one_more_each_time(tmp_path, capsys):
    for number in (1, 2, 3, 3):
        exercises.hint(["span_mask"], tmp_path)
        assert f"Hint {number} of 3" in capsys.readouterr().out


def test_plant_puts_mine_everywhere_it_is_used_and_takes_it_away_without_a_trace(my):
    ours, folder = masking.span_mask, my("span_mask", SPAN_MASK.format("return starts"))
    restore = mine.plant(my("masked_cross_entropy", "def masked_cross_entropy(*args): return 7"))
    try:
        assert masking.span_mask is train.span_mask and masking.span_mask is not ours
        hidden = train.draw_hidden(20, 30, 3, torch.Generator().manual_seed(0))
        assert any(".x." in row for row in check.drawn(hidden)), "the training masks are mine"
        assert train.LOSSES["magnet"]() == 7, "also in a dictionary"
    finally:
        restore()
    assert masking.span_mask is train.span_mask is ours
    assert sorted(os.listdir(folder)) == ["masked_cross_entropy.py", "span_mask.py"], "no bytecode"


@pytest.mark.parametrize("end", WRONG)
def test_check_tells_wrong_span_masks_apart_and_shows_the_line_of_mine_that_raises(end, my, request):
    folder = my("span_mask", SPAN_MASK.format(end))
    request.addfinalizer(mine.plant(folder))
    failure = first_failure("span_mask", folder)
    assert WRONG[end] in failure.claim + failure.told and "File" not in failure.told
    assert all(words in failure.told for words in ("put in", "came out", "expected")) or "'x'" in end


@pytest.mark.parametrize("source, words", [("def nucleus(:", "nucleus.py, line 1"), ("x = 1", "no function nucleus"),
                                           ("import nosuchmodule", "nosuchmodule")])
def test_plant_says_what_is_wrong_with_a_file_of_mine(source, words, my):
    with pytest.raises(ValueError, match=words):
        mine.plant(my("nucleus", source))


def study(folder, *arguments):
    return subprocess.run([sys.executable, "-m", "study", "--my", folder, *arguments], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


def test_check_runs_the_functions_tests_with_mine_and_says_what_came_out(my):
    """The examples of guidance_scale hold; its test finds the wrong number at rate 0.75."""
    right = "def guidance_scale(rate, start, end):\n    return rate * start + (1 - rate) * end\n"
    wrong = right.rstrip() + " + (rate == 0.75 and start == 10)\n"
    ended = study(my("guidance_scale", wrong), "check", "guidance_scale")
    assert ended.returncode == 1 and "2 of 3 claims hold" in ended.stdout, ended.stdout + ended.stderr
    for words in ("guidance_scale is strong while much is", "rate = 0.75", "came out    8.75", "expected    7.75"):
        assert words in ended.stdout, ended.stdout
    ended = study(my("guidance_scale", right), "check")
    assert ended.returncode == 0 and "3 of 3 claims hold." in ended.stdout, ended.stdout + ended.stderr
    assert exercises.state(exercises.EXERCISES["guidance_scale"], my("guidance_scale", right)) == "done"
    assert exercises.state(exercises.EXERCISES["guidance_scale"], my("guidance_scale", wrong)).endswith("changed since")


def test_there_are_at_least_45_mistakes_each_in_a_function_of_which_claims_speak():
    known = mistakes.read_mistakes()
    assert len(known) >= 45
    for mistake in known.values():
        compile(mistakes.planted(mistake), mistake.name, "exec")
        function = functions()[mistake.function]
        assert mistake.old != mistake.new and (function.tests or exercises.EXAMPLES[mistake.function]), mistake.name


def test_mistakes_says_which_claim_catches_one_and_refuses_a_name_that_it_does_not_know(tmp_path):
    ended = study(tmp_path, "mistakes", "linear schedule")
    assert ended.returncode == 0 and "by: Everything is hidden at t = 0" in ended.stdout, ended.stdout + ended.stderr
    assert "1 of 1 mistakes caught" in ended.stdout
    assert study(tmp_path, "mistakes", "no such").stderr.count("there is no mistake 'no such'") == 1


def test_cost_compares_a_mistake_with_the_right_code_clip_by_clip():
    same = {"frechet": {"model": 300.4}, "diversity": {"samples of one prompt": 9.96}}
    right, wrong = ({"right": {"a": n, "b": "55"}, "adherence": {"model, seen": [0] * 6}, **same} for n in ("54", "34"))
    assert mistakes.row("m", wrong, right) == "| m | 85.0% | -10.0 (-29.6 to +9.6) | 300 | 10.0 |"


@pytest.fixture
def page(make_magnet):
    """page(objective) -> a decode of a small model as a page, and its steps; 20 frames are 0.4 s."""
    def page(objective="magnet"):
        model, config = make_magnet(objective=objective, card=256), SamplingConfig((4, 2), hybrid_seconds=0.1)
        codes, codec, steps = torch.full((1, 4, 20), model.mask_id), load_codec("toy"), []
        generate(model, None, None, codes, config, on_step=lambda **step: steps.append(step))
        return watch.page(steps, config, codec, codes, PROMPT, "tiny", model.mask_id), steps
    return page


@pytest.mark.parametrize("objective, n_steps", [("magnet", 10), ("ar", 23), ("hybrid", 15)])
def test_watch_writes_every_step_and_its_sound_into_one_page(objective, n_steps, page):
    text, steps = page(objective)
    assert len(steps) == n_steps and "http" not in text and "src=" not in text.replace(".src =", "")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["prompt"] == PROMPT and len(data["steps"]) == len(data["stands"]) == n_steps
    for i, sound in data["audio"].items():
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(sound.partition(",")[2])))
        frames = steps[int(i)]["position"] - 3 if objective == "ar" or "position" in steps[int(i)] else 20
        assert len(wav) == min(frames, 20) * 320 and rate == 16_000, f"step {i}"
    assert str(n_steps - 1) in data["audio"], "the result can be heard"


PROBE = """<script>
window.onload = () => {
  const slider = document.getElementById("slider"), said = {};
  said.first = document.body.dataset.step;
  slider.value = 3; slider.dispatchEvent(new Event("input")); said.slid = document.body.dataset.step;
  document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"})); said.key = document.body.dataset.step;
  said.wide = document.documentElement.scrollWidth <= window.innerWidth;
  const done = () => { said.seconds = audio.duration; document.title = JSON.stringify(said); };
  audio.readyState ? done() : audio.addEventListener("loadedmetadata", done);
};
window.onerror = message => { document.title = "error: " + message; };
</script>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [500, 1280])
def test_watch_moves_by_slider_and_keys_in_a_browser_and_plays_the_length_of_the_clip(width, page, tmp_path):
    path = tmp_path / "decode.html"
    path.write_text(page()[0].replace("</html>", PROBE + "</html>"))
    for budget in (8000, 40_000, 200_000):  # of the page's own time, which a busy machine uses up too soon
        ended = subprocess.run([
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            f"--window-size={width},900", f"--virtual-time-budget={budget}", "--enable-logging=stderr", path.as_uri()],
            capture_output=True, text=True, timeout=300)
        if (said := re.search("<title>(.*?)</title>", ended.stdout)[1]).startswith("{"):
            break
    said = json.loads(said)
    assert said.pop("seconds") == pytest.approx(0.4, abs=0.02)
    assert said == {"first": "0", "slid": "3", "key": "4", "wide": True}
    assert "CONSOLE" not in ended.stderr
