# SPDX-License-Identifier: Apache-2.0
"""What the rest of the repository says: signals, flags, rules, dashboards, the version."""

import functools
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/chart"


class Strict(yaml.CSafeLoader):
    """Refuses a map that has a key twice, as the API server does."""


def _map(loader, node):
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.YAMLError(f"{node.start_mark}: the key {twice[0]!r} stands twice")
    return yaml.CSafeLoader.construct_mapping(loader, node, deep=True)


Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _map)


def load_all(text):
    return [value for value in yaml.load_all(text, Strict) if value]


def listed(texts):
    """The objects that a chart has rendered, without its notes."""
    return [o for path, text in sorted(texts.items()) if path.endswith(".yaml") for o in load_all(text)]


def load(path):
    [value] = load_all(path.read_text())
    return value


def text(path):
    return (ROOT / path).read_text()


def _needs():
    """The capabilities of each signal, and of those settings of gpu that have some of their own, by the documentation."""
    settings = {"--cuda-calls": "calls", "--gpu.device": "devices"}
    needs = {}
    for signal, capability, why in re.findall(r"^\| `(\w+)` \| CAP_(\w+) \| (.*?) \|", text("docs/security.md"), re.M):
        flag = re.match(r"with `(\S+)`: ", why)
        needs.setdefault(settings[flag[1]] if flag else signal, set()).add(capability)
    return needs


@dataclass
class Flag:
    switch: bool
    default: str | None
    variable: str


def _flags():
    """The flags that serve, by the sources of the command line."""
    [serve] = re.findall(r"pub struct Serve \{(.*?)\n\}", text("exporter/src/args.rs"), re.S)
    flags = {}
    for attributes, field, kind in re.findall(r"#\[arg\((.*?)\)\]\s*pub (\w+): (\S+),", serve, re.S):
        def value(name):
            found = re.search(rf'\b{name} = "?([^",\s)]+)"?', attributes)
            return found and found[1]

        name = value("long") or field.replace("_", "-")
        flags["--" + name] = Flag(kind == "bool", value("default_value") or value("default_value_t"), value("env"))
    return flags


def built(program):
    """A program of the tree, the newest where there are two."""
    paths = [*ROOT.glob(f"target/release/{program}"), *ROOT.glob(f"target/debug/{program}")]
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


@functools.cache
def rendered(job, runbooks):
    """Rules and dashboards by the mixin itself, for another job and another place of runbooks."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.jsonnet")
        config.write_text("{ _config+:: %s }" % json.dumps({"selector": f'job="{job}"', "runbookURL": runbooks + "%s"}))
        subprocess.run([built("chandra-mixin"), "render", "--config", config, "--out", folder], check=True)
        return _rules(Path(folder)), _dashboards(Path(folder))


def _rules(folder):
    return {path.stem: load(path) for path in sorted((folder / "alerts").glob("*.yaml"))}


def _dashboards(folder):
    return {path.name: path.read_text() for path in sorted((folder / "dashboards").glob("*.json"))}


FLAGS = _flags()
NEEDS = _needs()
SIGNALS = re.findall(r"(\w+)::ENTRY,", re.search(r"SIGNALS: &\[Entry\] = &\[(.*?)\];", text("exporter/src/signals/mod.rs"), re.S)[1])
RULES = _rules(ROOT)
DASHBOARDS = _dashboards(ROOT)
# A registry of the user's: none is assumed.
IMAGE = "registry.example/chandra"
# The values that are required.
IMAGED = {"image": {"repository": IMAGE}}
VERSION = re.search(r'^version = "(.*)"', text("Cargo.toml"), re.M)[1]
# The keys of each part of the file of --web.config.file.
WEB = {
    "": re.search(r"struct Raw \{(.*?)\n\}", text("exporter/src/web.rs"), re.S)[1],
    "tls_server_config": re.search(r"struct Raw \{(.*?)\n\}", text("exporter/src/web/tls.rs"), re.S)[1],
}
WEB = {part: set(re.findall(r"^\s+(?:pub\(super\) )?(\w+): ", fields, re.M)) for part, fields in WEB.items()}
