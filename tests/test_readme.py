import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


BEFORE, RECIPES = TEXT.split("\n## Recipes\n")


def code_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(code, names):
    exec(compile(code, "README.md", "exec"), names)


def test_recipes_run_one_after_the_other():
    names = {}
    for code in code_of(RECIPES):
        with warnings.catch_warnings():
            if "onnx" in code:
                pytest.importorskip("onnxscript")
                warnings.simplefilter("ignore")  # torch's exporter has some
            run(code, names)


@pytest.mark.parametrize("code", code_of(BEFORE))
def test_code_runs_as_printed(code, capsys):
    run(code, {})
    output = capsys.readouterr().out
    shown = re.search(re.escape(code) + r"```\n\n```text\n(.*?)```", TEXT, re.DOTALL)
    if not shown:
        assert all(float(line.split()[1]) < 1e-6 for line in output.splitlines())
        return
    # rounding differs from machine to machine, and with it how wide a column is
    number = re.compile(r"\d+\.\d+(?:e[-+]\d+)?|\de[-+]\d+")
    plain = [re.sub(r" +|-{2,}", " ", number.sub("#", text)) for text in (output, shown[1])]
    assert plain[0] == plain[1]
    for got, printed in zip(number.findall(output), number.findall(shown[1]), strict=True):
        assert 0.2 < float(got) / float(printed) < 5


def test_commands_make_their_own_environment():
    commands = re.findall(r"```bash\n(.*?)\n```", TEXT, re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        assert command.startswith("python -m venv .venv && .venv/bin/pip install torch==")
        assert "\n" not in command


def test_what_is_named_exists():
    for file in re.findall(r"(?:examples|tests)/[\w/]+\.(?:py|png|md)", TEXT):
        assert (ROOT / file).is_file(), file
    experiments = (ROOT / "examples" / "README.md").read_text()
    for file in re.findall(r"\w+\.py|figures/\w+\.png", experiments):
        assert (ROOT / "examples" / file).is_file(), file
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts <= set(re.findall(r"\w+\.py", experiments))
