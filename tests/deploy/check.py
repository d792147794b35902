# SPDX-License-Identifier: Apache-2.0
"""Checks deploy/ and leaves what other programs check in FOLDER/rendered.  usage: check.py FOLDER [readme | render FILE]"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cases
import mistakes
import readme
from helm_python import Chart, HelmError, dependency_update, lint, package
from yamllint import linter
from yamllint.config import YamlLintConfig
from repository import CHART, DASHBOARDS, FLAGS, IMAGED, ROOT, RULES, SIGNALS, VERSION, built, listed, load, load_all, text

UMBRELLA = ROOT / "deploy/examples/umbrella"
# Defaults that have changed since, by the name of the old values.
OLD = {"1": {"terminationGracePeriodSeconds": 15}}
# What chart-testing (ct lint) asks of Chart.yaml and of values.
YAMLLINT = YamlLintConfig("""
rules:
  braces: {min-spaces-inside: 0, max-spaces-inside: 0, min-spaces-inside-empty: -1, max-spaces-inside-empty: -1}
  brackets: {min-spaces-inside: 0, max-spaces-inside: 0, min-spaces-inside-empty: -1, max-spaces-inside-empty: -1}
  colons: {max-spaces-before: 0, max-spaces-after: 1}
  commas: {max-spaces-before: 0, min-spaces-after: 1, max-spaces-after: 1}
  comments: {require-starting-space: true, min-spaces-from-content: 2}
  empty-lines: {max: 2, max-start: 0, max-end: 0}
  hyphens: {max-spaces-after: 1}
  indentation: {spaces: consistent, indent-sequences: whatever, check-multi-line-strings: false}
  key-duplicates: enable
  new-line-at-end-of-file: enable
  new-lines: {type: unix}
  trailing-spaces: enable
  truthy: {level: warning}
""")
# Everything that is off by default, and a salt that is the same each time.
EVERYTHING = IMAGED | {kind: {"enabled": True} for kind in ("podMonitor", "prometheusRule", "dashboards", "networkPolicy", "ncclProfiler")}
EVERYTHING["signals"] = {"nccl": {"salt": {"existingSecret": "salt"}}}


def check_cases(chart, folder):
    """Every case; and what is left for others to check."""
    chosen = [*cases.cases()]
    monitors, dashboards, used, arguments = {}, {}, set(), set()
    found = {}
    for case in chosen:
        made = cases.render(chart, case)
        for problem in [*cases.problems(case, made), *cases.invalid(made)]:
            found.setdefault(problem, []).append(case)
        for (kind, name), o in made.items():
            if kind == "PodMonitor" or kind == "PrometheusRule" and len(monitors) < 40:
                monitors.setdefault(json.dumps(o, sort_keys=True), (kind, name))
            elif kind == "ConfigMap":
                dashboards |= o["data"]
            elif kind == "DaemonSet":
                [container] = o["spec"]["template"]["spec"]["containers"]
                arguments.add(tuple(container["args"]))
                used |= {argument.split("=")[0] for argument in container["args"]}
                used |= {flag for flag, is_ in FLAGS.items() if is_.variable in [v["name"] for v in container.get("env", [])]}
    for problem, those in found.items():
        # The case that chooses least.
        named = min(({choice: option for choice, option in case.items() if option != cases.DEFAULT[choice]} for case in those), key=len)
        yield f"{problem} (in {len(those)} combinations, such as {named or 'the defaults'})"
    yield from (f"no value sets {flag}" for flag in FLAGS if flag not in used)
    (folder / "manifests").mkdir(parents=True)
    (folder / "dashboards").mkdir()
    for number, (o, (kind, name)) in enumerate(monitors.items()):
        (folder / f"manifests/{number}-{kind}-{name}.yaml").write_text(o)
    for name, dashboard in dashboards.items():
        (folder / "dashboards" / name).write_text(dashboard)
    yield from accepted(arguments)
    options = sum(map(len, cases.CHOICES.values()))
    print(f"deploy: {len(chosen)} combinations of {options} options, any two of them in one; {len(cases._seen)} objects valid for Kubernetes {' and '.join(cases.KUBERNETES)}")


def accepted(arguments):
    """Whether the program itself takes the flags: it reads all of them before it helps."""
    binary = os.environ.get("CHANDRA_BINARY") or built("chandra")
    if not binary:
        print("SKIPPED: flags by the program itself: build it (cargo build), or name it in CHANDRA_BINARY", file=sys.stderr)
        if os.environ.get("CI"):
            yield "no chandra to take the flags"
        return
    for flags in sorted(arguments):
        done = subprocess.run([binary, *flags, "--help"], capture_output=True, text=True)
        if done.returncode != 0:
            yield f"chandra {' '.join(flags)}: {done.stderr.strip()}"
    print(f"deploy: {len(arguments)} command lines taken by {binary}")


def check_defaults(chart):
    """Defaults stand twice: in the command line and in values.yaml, where people see them."""
    signals = chart.values["signals"]
    defaults = {
        "--web.listen-address": f":{chart.values['port']}",
        "--retention": chart.values["retention"],
        "--max-owners": chart.values["maxOwners"],
        "--log.level": chart.values["logLevel"],
        "--rdma.zero-for": signals["rdma"]["zeroFor"],
        "--encryption.timed-every": signals["encryption"]["timedEvery"],
        "--encryption.vxlan-port": signals["encryption"]["vxlanPort"],
        "--encryption.geneve-port": signals["encryption"]["genevePort"],
        "--cuda-calls.budget": signals["gpu"]["cudaCalls"]["budget"],
    }
    for flag, default in defaults.items():
        if FLAGS[flag].default != str(default):
            yield f"values.yaml: {default} for {flag}, whose default is {FLAGS[flag].default}"
    yield from (f"values.yaml does not have the default of {flag}" for flag, is_ in FLAGS.items() if is_.default and flag not in defaults)
    if set(signals) != set(SIGNALS):
        yield f"values.yaml: signals {sorted(signals)}, and the exporter has {sorted(SIGNALS)}"
    for what in "version", "appVersion":
        if chart.metadata[what] != VERSION:
            yield f"Chart.yaml: {what} {chart.metadata[what]}, not {VERSION}"


def check_upgrades(folder):
    """What an upgrade must not change: selectors, ever; pods, by the version of the chart alone."""
    copy = folder / "next"
    shutil.copytree(CHART, copy)
    (copy / "Chart.yaml").write_text((CHART / "Chart.yaml").read_text().replace(f"version: {VERSION}", "version: 9.9.9", 1))
    daemonset = lambda chart, values: cases.merged(*[o for o in load_all(chart.render(cases.merged(IMAGED, values), name="chandra", namespace="a")["chandra/templates/daemonset.yaml"])])
    with Chart.load(CHART) as old, Chart.load(copy) as new:
        before, after = daemonset(old, {}), daemonset(new, {})
        if new.version != "9.9.9" or before["spec"] != after["spec"]:
            yield "a new version of the chart alone restarts the pods"
        for values in {"commonLabels": {"a": "b"}}, {"podLabels": {"a": "b"}}, {"image": {"tag": "9"}}, {"fullnameOverride": "x"}:
            if daemonset(new, values)["spec"]["selector"] != before["spec"]["selector"]:
                yield f"{values} changes the selector, which cannot be"


def check_previous(folder):
    """Upgrades with the values of older charts, as `helm upgrade` has them: with --reuse-values the old chart's defaults are all there is
    besides, with --reset-then-reuse-values the new chart's. What nobody has set is as if it had been installed anew."""
    for previous in sorted((ROOT / "tests/deploy/previous").glob("*.yaml")):
        copy = folder / "reused" / previous.stem
        shutil.copytree(CHART, copy)
        (copy / "values.yaml").write_text(previous.read_text())
        with Chart.load(CHART) as new, Chart.load(copy) as reused:
            # Their default image is nobody's.
            for way, chart in ("--reuse-values", reused), ("--reset-then-reuse-values", new):
                try:
                    chart.render({} if chart is reused else load(previous), name="chandra", namespace="a")
                except HelmError as error:
                    if "image.repository" not in str(error):
                        yield f"{way} from {previous.name}: {error}"
                else:
                    yield f"{way} from {previous.name}: the image of nobody is accepted"
            without = {key: value for key, value in EVERYTHING.items() if key != "ncclProfiler"}
            for what in IMAGED, without, EVERYTHING | {"ncclProfiler": new.values["ncclProfiler"] | {"enabled": True}}:
                fresh = new.render(cases.merged(what, OLD.get(previous.stem, {})), name="chandra", namespace="a")
                # What has been set before, and what is set now.
                for way, chart, values in ("--reuse-values", reused, what), ("--reset-then-reuse-values", new, cases.merged(load(previous), what)):
                    try:
                        texts = chart.render(values, name="chandra", namespace="a")
                    except HelmError as error:
                        yield f"{way} from {previous.name}: {error}"
                        continue
                    for path in fresh:
                        if path.endswith(".yaml") and load_all(texts[path]) != load_all(fresh[path]) and not ("salt" in path and what == IMAGED):
                            yield f"{way} from {previous.name}: {path} is not what a new install has"


def check_nulls(chart):
    """A null deletes a default, and what completes values does not bring it back."""
    nulls = EVERYTHING | {key: None for key in chart.values if key not in EVERYTHING}
    nulls |= {key: {"enabled": True, "labels": None, "annotations": None} for key in ("podMonitor", "prometheusRule", "dashboards")}
    for values in nulls, EVERYTHING | {"probes": {"startup": None, "liveness": None, "readiness": None}}:
        made = cases.by_name(listed(chart.render(values, name="chandra", namespace="a")))
        yield from (f"with nulls: {problem}" for problem in cases.invalid(made))
        pod = made["DaemonSet", "chandra"]["spec"]["template"]["spec"]
        if pod["containers"][0]["securityContext"]["seccompProfile"] != {"type": "RuntimeDefault"}:
            yield "a null leaves it without a seccomp profile"
    values = IMAGED | {"resources": {"limits": {"memory": None}}, "nodeSelector": {"kubernetes.io/os": None}, "tolerations": None, "podMonitor": {"enabled": True, "labels": {"release": None}}}
    texts = chart.render(values, name="chandra", namespace="a")
    pod = load_all(texts["chandra/templates/daemonset.yaml"])[0]["spec"]["template"]["spec"]
    [monitor] = load_all(texts["chandra/templates/podmonitor.yaml"])
    if pod["containers"][0]["resources"].get("limits") or pod.get("nodeSelector") or pod.get("tolerations") or "release" in monitor["metadata"]["labels"]:
        yield "a default that a null deletes is back"


def check_package(folder):
    """Whether the package has what the links lead to, and renders the same."""
    for values in [*sorted(CHART.glob("ci/*-values.yaml")), None]:
        report = lint(CHART, load(values) if values else {}, strict=True)
        findings = report["errors"] + [m["error"] for m in report["messages"] if m["severity"] > 1]
        yield from (f"helm lint with {values and values.name}: {finding}" for finding in findings)
        if values:
            with Chart.load(CHART) as chart:
                chart.render(load(values), name="chandra", namespace="a")
    for file in CHART / "Chart.yaml", CHART / "values.yaml", *CHART.glob("ci/*.yaml"), UMBRELLA / "Chart.yaml", UMBRELLA / "values.yaml":
        yield from (f"yamllint: {file.relative_to(ROOT)}:{problem.line}: {problem.desc}" for problem in linter.run(file.read_text(), YAMLLINT))
    archive = package(CHART, destination=folder)
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar}
        for name, member in members.items():
            if not member.isfile():
                yield f"{name} in the package is no file"
        for source in [*ROOT.glob("alerts/*.yaml"), *ROOT.glob("dashboards/*.json")]:
            name = f"chandra/files/{source.relative_to(ROOT)}"
            if name not in members or tar.extractfile(name).read() != source.read_bytes():
                yield f"{name} in the package is not {source.name}"
    with Chart.load(CHART) as here, Chart.load(archive) as packaged:
        one, other = (chart.render(EVERYTHING, name="chandra", namespace="a") for chart in (here, packaged))
        if one != other:
            yield "the package does not render as the folder does"


def check_umbrella(folder):
    """The example, with the Cilium chart at hand or a stand-in that shows its values."""
    copy = folder / "umbrella"
    (copy / "charts").mkdir(parents=True)
    for file in "Chart.yaml", "values.yaml":
        shutil.copy(UMBRELLA / file, copy / file)
    metadata = load(UMBRELLA / "Chart.yaml")
    wanted = {dependency["name"]: dependency for dependency in metadata["dependencies"]}
    if (UMBRELLA / wanted["chandra"]["repository"].removeprefix("file://")).resolve() != CHART.resolve():
        yield f"umbrella: {wanted['chandra']['repository']} is not the chart"
    if wanted["chandra"]["version"] != VERSION:
        yield f"umbrella: chandra {wanted['chandra']['version']}, not {VERSION}"
    values = load(UMBRELLA / "values.yaml")
    if values["cilium"] != load(ROOT / "helm-values/cilium.yaml"):
        yield "umbrella: the values of cilium are not helm-values/cilium.yaml"

    # By Helm's own way to a chart in a folder, in a chart that has no other dependency: there is no network here.
    alone = folder / "alone"
    alone.mkdir()
    one = {"name": "chandra", "version": VERSION, "repository": f"file://{CHART}"}
    (alone / "Chart.yaml").write_text(json.dumps({"apiVersion": "v2", "name": "alone", "version": "0.1.0", "dependencies": [one]}))
    dependency_update(alone, skip_refresh=True)
    for archive in (alone / "charts").iterdir():
        shutil.copy(archive, copy / "charts")
    cilium = next(filter(None, map(charts_cilium, folders())), None)
    if cilium:
        (copy / f"charts/{cilium.name}").symlink_to(cilium)
    else:
        stand_in = copy / "charts/cilium"
        (stand_in / "templates").mkdir(parents=True)
        (stand_in / "Chart.yaml").write_text(f"apiVersion: v2\nname: cilium\nversion: {wanted['cilium']['version']}\n")
        body = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: cilium-config\ndata:\n  values: {{ toJson .Values | quote }}\n"
        (stand_in / "templates/values.yaml").write_text(body)
    with Chart.load(copy) as chart:
        made = listed(chart.render({"chandra": IMAGED}, name="cilium", namespace="kube-system"))
    kinds = [(o["kind"], o["metadata"]["name"]) for o in made]
    own = {("DaemonSet", "cilium-chandra"), ("PodMonitor", "cilium-chandra"), ("ConfigMap", "cilium-config")}
    own |= {("PrometheusRule", f"cilium-chandra-{signal}") for signal in RULES}
    if not own <= set(kinds):
        yield f"umbrella: lacks {sorted(own - set(kinds))}"
    if sum(kind == "ConfigMap" and "-dashboard-" in name for kind, name in kinds) < len(DASHBOARDS):
        yield "umbrella: lacks dashboards"
    if not cilium:
        [config] = [o for o in made if o["metadata"]["name"] == "cilium-config"]
        got = json.loads(config["data"]["values"])
        if {key: got.get(key) for key in values["cilium"]} != values["cilium"]:
            yield "umbrella: cilium does not get its values"
    yield from cases.invalid(cases.by_name([o for o in made if "chandra" in o["metadata"]["name"]]))
    print(f"deploy: the umbrella with {'the chart ' + str(cilium) if cilium else 'a stand-in'} for Cilium")


def check_docs(chart):
    """The values that docs/deploy.md shows."""
    for block in re.findall(r"```yaml\n(.*?)```", text("docs/deploy.md"), re.S):
        [values] = load_all(block)
        if "scrape_configs" in values:
            continue
        try:
            chart.render(cases.merged(IMAGED, values), name="chandra", namespace="monitoring")
        except HelmError as error:
            yield f"docs/deploy.md: {error}"


def folders():
    cache = os.environ.get("CHANDRA_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "chandra")
    return map(Path, (os.environ.get("CHANDRA_CHARTS") or f"{cache}/charts").split(":"))


def charts_cilium(folder):
    """A chart of Cilium that has templates, in a folder."""
    for path in sorted([*folder.glob("*.tgz"), *(file.parent for file in itertools.chain(folder.glob("Chart.yaml"), folder.glob("*/Chart.yaml")))]):
        if "cilium" in path.name:
            with Chart.load(path) as chart:
                if chart.name == "cilium" and chart.templates:
                    return path.resolve()
    return None


def check_unit(chart):
    """The unit of hosts without Kubernetes has the capabilities of the chart, and one more."""
    lines = dict(line.split("=", 1) for line in text("deploy/chandra.service").splitlines() if "=" in line and line[0].isupper())
    everything = cases.DEFAULT | {"gpu": "calls"}
    security = cases.render(chart, everything)["DaemonSet", "chandra"]["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    capabilities = {f"CAP_{name}" for name in security["capabilities"]["add"]} | {"CAP_DAC_READ_SEARCH"}
    found = lines["CapabilityBoundingSet"].split()
    if sorted(found) != sorted(capabilities):
        yield f"chandra.service: capabilities {found}, not {sorted(capabilities)}"
    wanted = {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectControlGroups": "yes", "PrivateTmp": "yes", "LimitMEMLOCK": "infinity",
        "AmbientCapabilities": "", "MemoryMax": chart.values["resources"]["limits"]["memory"].removesuffix("i"),
    }  # fmt: skip
    yield from (f"chandra.service: {key}={lines.get(key)}, not {value}" for key, value in wanted.items() if lines.get(key) != value)
    # Each hides something that the exporter reads, or takes its capabilities away.
    never = "ProtectKernelTunables", "ProtectProc", "ProcSubset", "PrivateUsers", "PrivateNetwork", "PrivateDevices", "DynamicUser", "User"
    yield from (f"chandra.service: {key}" for key in never if key in lines)
    if not {"bpf", "perf_event_open"} <= set(lines["SystemCallFilter"].split()) or lines["RestrictNamespaces"] != "net":
        yield "chandra.service: what it may call"
    families = {"AF_INET", "AF_INET6", "AF_NETLINK"}
    if not families <= set(lines["RestrictAddressFamilies"].split()):
        yield "chandra.service: RestrictAddressFamilies"


def main(folder, *words):
    # Helm's library writes to the descriptor that each link was followed, and more of that kind.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(folder / "helm.log", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    if words == ("readme",):
        readme.write()
        return 0
    if words[:1] == ("render",):
        with Chart.load(CHART) as chart:
            texts = chart.render(next(iter(load_all(sys.stdin.read()))), name="chandra", namespace="monitoring")
        Path(words[1]).write_text(json.dumps(listed(texts)))
        return 0
    found = []
    with Chart.load(CHART) as chart:
        found += [*check_cases(chart, folder / "rendered"), *check_defaults(chart), *mistakes.schema_problems(chart), *check_unit(chart), *check_docs(chart), *check_nulls(chart)]
        wrong, refused = mistakes.refusals(chart)
        found += wrong
    print(f"deploy: {refused} wrong values, each refused in one line: {len(wrong)} problems")
    found += [*readme.problems(), *check_upgrades(folder), *check_previous(folder), *check_package(folder), *check_umbrella(folder)]
    unnoticed = [*mistakes.unnoticed(folder / "changed")]
    found += unnoticed
    print(f"deploy: {len(mistakes.CHANGES)} changes of the templates on purpose: {len(unnoticed)} unnoticed")
    for problem in found:
        print(f"  {problem}", file=sys.stderr)
    print(f"deploy: {len(found)} problems")
    return bool(found)


sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
