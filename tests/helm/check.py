# SPDX-License-Identifier: Apache-2.0
"""Checks that the keys of helm-values/*.yaml are the charts' own (no schema forbids others), that the charts' schemas
hold, and that what Helm renders has what each file is for. Then makes mistakes and requires that each is refused. Then
reads what `chandra-mixin merge` makes of users' values files (mixin/tests/values), as Helm does: nothing of theirs is lost.
usage: check.py CHART..."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from helm_python import Chart, HelmError, values_from_yaml

ROOT = Path(__file__).resolve().parents[2]


def load(text):
    return yaml.load(text, yaml.CSafeLoader)


RULES = {path.stem: load(path.read_text()) for path in sorted((ROOT / "alerts").glob("*.yaml"))}
DASHBOARDS = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "dashboards").glob("*.json"))}
# Maps that have defaults and are for the user's own keys all the same; config.data is the configuration of the program.
OPEN = {"scrapeConfigs", "config.data"}


def unknown_keys(values, *defaults, path=""):
    """Keys that the chart has no default for. A map that is empty there, or null, is for the user's own keys."""
    for key, value in values.items():
        known = [default[key] for default in defaults if key in default]
        if not known:
            yield path + key
        elif isinstance(value, dict) and path + key not in OPEN:
            maps = [default for default in known if isinstance(default, dict) and default]
            if maps:
                yield from unknown_keys(value, *maps, path=f"{path}{key}.")


def refusals(chart, values):
    # A chart's own values keep nulls; the merged ones have the values of the charts within it.
    found = [f"unknown key {key}" for key in unknown_keys(values, chart.values, chart.merge_values({}))]
    try:
        chart.validate_schema(values)
    except HelmError as error:
        found.append(str(error))
    return found


def render(chart, values):
    """The rendered objects by kind and name; an empty one for what is not there."""
    texts = chart.render(values, name=chart.name, namespace="kube-system")
    objects = [o for path, text in texts.items() if path.endswith(".yaml") for o in yaml.load_all(text, yaml.CSafeLoader) if o]
    by_name = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    return lambda kind, name: by_name.get((kind, name), {})


def at(tree, *path):
    for key in path:
        tree = (tree or {}).get(key)
    return tree


def cilium(objects, values):
    metrics = at(objects("ConfigMap", "cilium-config"), "data", "hubble-metrics") or ""
    yield "Hubble's metrics", metrics.split() == values["hubble"]["metrics"]["enabled"]
    for monitor in "cilium-agent", "hubble":
        labels = at(objects("ServiceMonitor", monitor), "metadata", "labels") or {}
        yield f"ServiceMonitor {monitor}", values["prometheus"]["serviceMonitor"]["labels"].items() <= labels.items()

    pod = at(objects("DaemonSet", "cilium"), "spec", "template")
    containers = at(pod, "spec", "containers") or []
    [sidecar] = [c for c in containers if c["name"] == "chandra"] or [{}]
    yield "the sidecar", [sidecar] == values["extraContainers"]
    mounted = {mount["name"] for mount in sidecar.get("volumeMounts", [])}
    yield "the sidecar's volumes", mounted and mounted <= {volume["name"] for volume in at(pod, "spec", "volumes")}
    [port] = values["extraContainers"][0]["ports"]
    taken = [p["containerPort"] for c in containers for p in c.get("ports", [])]
    yield "the sidecar's own port", taken.count(port["containerPort"]) == 1
    monitor = load((ROOT / "manifests/podmonitor-cilium-sidecar.yaml").read_text())["spec"]
    selected = monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    yield "what the PodMonitor selects", selected and monitor["podMetricsEndpoints"][0]["port"] in [p["name"] for p in sidecar.get("ports", [])]


def kube_prometheus_stack(objects, values):
    stack = "kube-prometheus-stack"
    selector = objects("Prometheus", f"{stack}-prometheus")["spec"]["ruleSelector"]["matchLabels"]
    for signal, rules in RULES.items():
        rule = objects("PrometheusRule", f"{stack}-chandra-{signal}")
        yield f"rules of {signal}, templates untouched", rule and rule["spec"] == rules
        yield f"Prometheus selects the rules of {signal}", rule and selector.items() <= rule["metadata"]["labels"].items()

    [folder] = [p["options"]["path"] for p in values["grafana"]["dashboardProviders"]["chandra.yaml"]["providers"]]
    provider = at(objects("ConfigMap", f"{stack}-grafana"), "data", "chandra.yaml") or "{}"
    yield "the provider of dashboards", load(provider) == values["grafana"]["dashboardProviders"]["chandra.yaml"]
    dashboards = at(objects("ConfigMap", f"{stack}-grafana-dashboards-chandra"), "data") or {}
    containers = objects("Deployment", f"{stack}-grafana")["spec"]["template"]["spec"]["containers"]
    mounted = [mount["mountPath"] for c in containers for mount in c["volumeMounts"]]
    yield "the provider's file in Grafana", "/etc/grafana/provisioning/dashboards/chandra.yaml" in mounted
    for name, dashboard in DASHBOARDS.items():
        yield name, json.loads(dashboards.get(name, "null")) == dashboard
        yield f"{name} in Grafana", f"{folder}/{name}" in mounted


def prometheus(objects, values):
    files = objects("ConfigMap", "prometheus-server")["data"]
    rendered = {name: load(files[name]).get("groups", []) for name in ("recording_rules.yml", "alerting_rules.yml")}
    groups = [group for file in RULES.values() for group in file["groups"]]
    for name, of in rendered.items():
        kind = "record" if name == "recording_rules.yml" else "alert"
        yield f"{name}, templates untouched", of == [group for group in groups if kind in group["rules"][0]]
        yield f"promtool on {name}", of and promtool("rules", files[name])
    jobs = [job for job in load(files["prometheus.yml"])["scrape_configs"] if job["job_name"] == "chandra"]
    yield "the scrape job", jobs == [values["scrapeConfigs"]["chandra"]]
    # Debian builds Prometheus without this one.
    rest = [{key: value for key, value in job.items() if key != "kubernetes_sd_configs"} for job in jobs]
    yield "promtool on the scrape job", rest and promtool("config", json.dumps({"scrape_configs": rest}))


def opentelemetry_ebpf_instrumentation(objects, values):
    name = "opentelemetry-ebpf-instrumentation"
    data = at(objects("ConfigMap", name), "data") or {}
    config = load(next(iter(data.values()), "{}"))
    ours = values["config"]["data"]
    yield "the attributes of requests", (at(config, "attributes") or {}).items() >= ours["attributes"].items()
    yield "nothing is sent to a collector", config and not any(key in config for key, value in ours.items() if value is None)
    monitor = objects("ServiceMonitor", name)
    yield "its ServiceMonitor", values["serviceMonitor"]["additionalLabels"].items() <= (at(monitor, "metadata", "labels") or {}).items()
    [endpoint] = at(monitor, "spec", "endpoints") or [{}]
    ports = at(objects("Service", name), "spec", "ports") or []
    yield "the Service that it selects", endpoint.get("port") in [port["name"] for port in ports]


def promtool(what, text):
    if not shutil.which("promtool"):
        print(f"SKIPPED: promtool check {what}: promtool is missing: make setup", file=sys.stderr)
        return not os.environ.get("CI")
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(["promtool", "check", what, file.name], capture_output=True, text=True)
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode == 0


def lost(before, after, kept, path=""):
    """Paths of a user's values that are not as they were, but for what merging does to metrics and to nothing."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            where = f"{path}.{key}".lstrip(".")
            if key in after:
                yield from lost(value, after[key], kept, where)
            else:
                yield where
    elif isinstance(before, list) and isinstance(after, list):
        rest = after[: len(before)]
        if path == "hubble.metrics.enabled":
            same = [mine(old) <= mine(new) if isinstance(old, str) else old == new for old, new in zip(before, rest)]
        else:
            same = [old == new for old, new in zip(before, rest)]
        if len(rest) < len(before) or not all(same):
            yield path
    elif before != after and not (before is None and path not in kept and isinstance(after, dict | list)):
        yield path


def mine(entry):
    """What an entry of hubble.metrics.enabled says: `drop:labelsContext=a,b` is the metric, and a pair for each value."""
    name, _, options = entry.partition(":")
    pairs = [option.partition("=") for option in options.split(";") if option]
    return {name} | {(name, key.lower(), value) for key, _, values in pairs for value in values.replace("|", ",").split(",")}


def without_set(values):
    """A user's values, with the list that is meant where Hubble's metrics stand as `--set` takes them: "{a,b}", or {a, b}."""
    metrics = at(values, "hubble", "metrics") or {}
    match metrics.get("enabled"):
        case str(text):
            meant = text.strip("{}")
        case dict(keys):
            meant = ",".join(keys)
        case _:
            return values
    entries = [entry.replace("\\,", ",") for entry in re.split(r"(?<!\\),", meant)]
    return values | {"hubble": values["hubble"] | {"metrics": metrics | {"enabled": entries}}}


def absent(ours, after, kept, path=""):
    """Paths of ours that are not in merged values, and that the user did not decide otherwise."""
    if any(path == other or path.startswith(f"{other}.") for other in kept):
        return
    if isinstance(ours, dict) and isinstance(after, dict):
        for key, value in ours.items():
            yield from absent(value, after.get(key), kept, f"{path}.{key}".lstrip("."))
    elif path == "hubble.metrics.enabled":
        said = set().union(*(mine(entry) for entry in after or [] if isinstance(entry, str)))
        yield from (f"{path}: {entry}" for entry in ours if not mine(entry) <= said)
    elif isinstance(ours, list):
        names = [item["name"] for item in after or []]
        yield from (f"{path}: {item['name']}" for item in ours if item["name"] not in names)
    elif path.endswith(".labels.release") and after:
        # As the user's other monitors have it.
        return
    elif ours != after:
        yield path


def unlisted(values, listed, path=""):
    """Keys of a chart that mixin/charts does not have; a leaf there is a list."""
    for key, value in values.items():
        if key not in listed:
            yield path + key
        elif isinstance(value, dict) and isinstance(listed[key], dict):
            yield from unlisted(value, listed[key], f"{path}{key}.")


def merged(chart, ours):
    """Problems of what merging makes of users' values."""
    for golden in sorted((ROOT / "mixin/tests/values/expected").glob("*.merged.yaml")):
        name = golden.name.removesuffix(".merged.yaml")
        before = without_set(values_from_yaml((ROOT / f"mixin/tests/values/{name}.yaml").read_bytes().decode()) or {})
        after = values_from_yaml(golden.read_bytes().decode())
        notes = (ROOT / f"mixin/tests/values/expected/{name}.merge.txt").read_text().splitlines()[:-1]
        notes = [note.split(": ", 2) for note in notes]
        kept = {path for _, path, text in notes if " stays" in text}
        if "hubble.metrics.dynamic.enabled" in kept:
            kept.add("hubble.metrics.enabled")
        wanted = {key: value for file, values in ours.items() for key, value in values.items() if "sidecar" not in file or name == "sidecar"}
        yield from (f"{name}: lost {path}" for path in lost(before, after, kept))
        yield from (f"{name}: without our {path}" for path in absent(wanted, after, kept))
        # What the user's own values are refused for comes in any order.
        own = {line for refusal in refusals(chart, before) for line in refusal.splitlines()}
        yield from (f"{name}: {line}" for refusal in refusals(chart, after) for line in refusal.splitlines() if line not in own)
        if not chart.templates:
            continue
        try:
            render(chart, before)
        except HelmError:
            # Their own mistake: nothing can be said of what comes of it.
            continue
        try:
            config = at(render(chart, after)("ConfigMap", "cilium-config"), "data")
        except HelmError as error:
            yield f"{name}: {error}"
            continue
        static = at(after, "hubble", "metrics", "enabled") or []
        if at(after, "hubble", "enabled") is not False and (config.get("hubble-metrics") or "").split() != static:
            yield f"{name}: Hubble's metrics are not rendered"


# Per chart: our files, what they have to bring about, and mistakes that keys or the schema have to refuse.
CHARTS = {
    "cilium": (
        ["cilium.yaml", "cilium-sidecar.yaml"],
        cilium,
        [
            {"hubble": {"metrics": {"enable": ["drop"]}}},
            {"hubble": {"metrics": {"enabled": "drop"}}},
            {"prometheus": {"enabled": "yes"}},
            {"prometheusRules": {"groups": []}},
        ],
    ),
    "kube-prometheus-stack": (
        ["kube-prometheus-stack.yaml"],
        kube_prometheus_stack,
        [{"additionalPrometheusRuleMap": {}}, {"grafana": {"dashboard": {}}}],
    ),
    "opentelemetry-ebpf-instrumentation": (
        ["opentelemetry-ebpf-instrumentation.yaml"],
        opentelemetry_ebpf_instrumentation,
        [{"serviceMonitor": {"labels": {}}}, {"service": {"enabled": "yes"}}, {"config": {"data": "application"}}],
    ),
    "prometheus": (
        ["prometheus.yaml"],
        prometheus,
        [{"serverFiles": {"alerting_rules.yaml": {}}}, {"scrapeConfig": {}}, {"serverFiles": []}],
    ),
}


def check(chart):
    """Its problems."""
    files, expected, mistakes = CHARTS[chart.name]
    ours = {file: values_from_yaml((ROOT / "helm-values" / file).read_text()) for file in files}
    refused = [f"helm-values/{file}: {refusal}" for file, values in ours.items() for refusal in refusals(chart, values)]
    refused += [f"accepted, and should not be: {mistake}" for mistake in mistakes if not refusals(chart, mistake)]
    if refused:
        return refused
    problems = list(merged(chart, ours)) if chart.name == "cilium" else []
    for path in (ROOT / "mixin/charts").glob(f"{chart.name}-*.json"):
        listed = json.loads(path.read_text())
        if listed["version"] == chart.version:
            problems += [f"{path.name}: no {key}: chandra-mixin keys writes it" for key in unlisted(chart.values, listed["keys"])]
    if problems:
        return problems
    if not chart.templates:
        print(f"SKIPPED: rendering of {chart.name} {chart.version}: only its values are there", file=sys.stderr)
        return []

    values = {key: value for file in ours.values() for key, value in file.items()}
    try:
        objects = render(chart, values)
    except HelmError as error:
        return [str(error)]
    # What is there without our values proves nothing.
    without = expected(render(chart, {}), values)
    return [f"not rendered as meant: {what}" for what, right in expected(objects, values) if not right] + [
        f"rendered without our values too: {what}" for what, right in without if right
    ]


failed = False
missing = set(CHARTS)
for path in sys.argv[1:]:
    with Chart.load(path) as chart:
        if chart.name not in CHARTS:
            continue
        missing.discard(chart.name)
        problems = check(chart)
        print(f"helm: {chart.name} {chart.version}: {len(problems)} problems")
        for problem in problems:
            failed = True
            print(f"  {problem}", file=sys.stderr)
for name in sorted(missing):
    print(f"SKIPPED: {', '.join(CHARTS[name][0])}: no chart {name} there (helm pull)", file=sys.stderr)
sys.exit(failed)
