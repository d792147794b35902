# SPDX-License-Identifier: Apache-2.0
"""The table of values in the chart's README, which is values.yaml in another form."""

import json
import re

from repository import CHART, load

README = CHART / "README.md"
BEGIN, END = "<!-- values: tests/deploy/check readme -->\n", "<!-- end of values -->\n"


def rows():
    """Path, default and comment of each value; the comment is empty where there is none."""
    values, stack, comment, covered = load(CHART / "values.yaml"), [], [], []
    for line in (CHART / "values.yaml").read_text().splitlines():
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if bare.startswith("#"):
            comment.append(bare[1:].strip())
            continue
        found = re.match(r"([\w./-]+):(?: |$)", bare)
        if not found:
            comment = []
            continue
        stack = [(depth, key) for depth, key in stack if depth < indent] + [(indent, found[1])]
        path = tuple(key for _, key in stack)
        if any(path[: len(above)] == above for above in covered):
            continue
        value = values
        for key in path:
            value = value[key]
        if comment or not isinstance(value, dict) or not value:
            covered.append(path)
            yield ".".join(path), value, " ".join(comment)
        comment = []


def table():
    cells = [(f"`{path}`", f"`{json.dumps(value, ensure_ascii=False)}`", comment.replace("|", "\\|")) for path, value, comment in rows()]
    lines = ["| value | default | what |", "|---|---|---|"] + ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def split():
    before, rest = README.read_text().split(BEGIN)
    return before, *rest.split(END)


def problems():
    if split()[1] != table():
        yield "deploy/chart/README.md: the table of values is not what values.yaml makes: run tests/deploy/check readme"
    yield from (f"deploy/chart/values.yaml: {path} has no comment" for path, _, comment in rows() if not comment)


def write():
    before, _, after = split()
    README.write_text(before + BEGIN + table() + END + after)
