from __future__ import annotations

import subprocess

import pytest

from simpletuner.config.shell_lines import parse_shell
from simpletuner.core.errors import ConfigError

SCRIPT = r"""
# a comment
export A=plain # after it
B='single $A' ; C="double $A ${A}s \" \$A \n"
D=$A/$B
E+=first
E+=" second"
F=a\ b"c"'d'
G=${MISSING:-default}${A:-unused}
H="two
lines"
I=x \
J=y#z
export K
L=
"""


def read(text: str, **environ: str) -> dict[str, str]:
    return {a.name: a.value for a in parse_shell(text, "config.env", environ)}


def test_values_are_those_of_bash() -> None:
    values = read(SCRIPT)
    shown = "".join(f'printf "%s\\0" "${name}"\n' for name in values)
    bash = subprocess.run(
        ["bash", "-c", SCRIPT + shown], capture_output=True, text=True, check=True, env={}
    )

    assert list(values.values()) == bash.stdout.split("\0")[:-1]


def test_the_environment_fills_variables_in() -> None:
    assert read('A="${HOME}/x $HOME"', HOME="/h") == {"A": "/h/x /h"}


def test_lines_exports_and_growth_are_known() -> None:
    found = parse_shell('A=1\nexport A="$A 2"\nB+=3', "", {})

    assert [(a.name, a.line, a.exported, a.grows) for a in found] == [
        ("A", 1, False, False),
        ("A", 2, True, True),
        ("B", 3, False, True),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("</details>", "'</details>' is not an assignment; this file is read, not run"),
        ("A = 1", "no space around ="),
        ("A=$(ls)", "commands are not run in this file"),
        ("A=`ls`", "commands are not run in this file"),
        ('A="x', "a double quote is not closed"),
        ("A='x", "a single quote is not closed"),
        ("A=${B%%x}", "only ${NAME} and ${NAME:-default} are read here"),
    ],
)
def test_what_is_no_assignment_is_named_with_its_line(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_shell(f"OK=1\n{line}\n", "config.env", {})

    (problem,) = caught.value.problems
    assert message in problem.message
    assert (problem.file, problem.line) == ("config.env", 2)


def test_all_bad_lines_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_shell("one\nA=1\ntwo\n", "", {})

    assert [problem.line for problem in caught.value.problems] == [1, 3]
