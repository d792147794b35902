# SPDX-License-Identifier: Apache-2.0
"""Values that have to be refused in one line that says where, and changes of the chart that the checks have to notice."""

import json
import shutil

from cases import DEFAULT, MONITOR_TLS, TLS, USERS, cases, invalid, merged, problems, render
from helm_python import Chart, HelmError
from repository import CHART, IMAGED, WEB

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
# Maps that are the user's own, by what they hold: of the API, or of another program.
OWN = {
    "global", "affinity.nodeAffinity", "affinity.podAffinity", "affinity.podAntiAffinity", "extraEnv[].valueFrom", "extraVolumes[]",
    "extraVolumeMounts[]", "networkPolicy.from[].ipBlock", "networkPolicy.from[].namespaceSelector", "networkPolicy.from[].podSelector",
    "podMonitor.metricRelabelings[]", "podMonitor.relabelings[]", "podMonitor.tlsConfig", "resources.claims[]", "ncclProfiler.resources.claims[]",
}  # fmt: skip


def resolved(schema):
    return SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema


def nodes(schema=SCHEMA, path=()):
    """Each part of the schema with the keys that lead to it; an item of a list has the key 0."""
    schema = resolved(schema)
    yield path, schema
    for key, inner in schema.get("properties", {}).items():
        yield from nodes(inner, (*path, key))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], (*path, "any"))
    if "items" in schema:
        yield from nodes(schema["items"], (*path, 0))


def shown(path):
    return "".join("[]" if key == 0 else f".{key}" for key in path).removeprefix(".")


def nested(path, value, schema=SCHEMA):
    """The values that have something there, and around it only what is required."""
    if not path:
        return value
    key, *rest = path
    schema = resolved(schema)
    if key == 0:
        return [nested(rest, value, schema["items"])]
    inner = schema.get("properties", {}).get(key, {})
    return {required: "name" for required in schema.get("required", [])} | {key: nested(rest, value, inner)}


def by_schema():
    """Values that are wrong by themselves, and what the one line has to say."""
    for path, schema in nodes():
        pointer = "/" + "/".join(map(str, path)) if path else ""
        place = f"at '{pointer}'"
        kind = schema.get("type")
        if kind == "object":
            if schema.get("additionalProperties") is False:
                item = {key: "name" for key in schema.get("required", [])}
                yield nested(path, item | {"unknownKey": 1}), [place, "'unknownKey' not allowed"]
            if path:
                yield nested(path, "text"), [place, "want object"]
        elif kind == "array":
            yield nested(path, "text"), [place, "want array"]
        elif kind == "boolean":
            yield nested(path, "yes"), [place, "want boolean"]
        elif kind in ("integer", "number"):
            yield nested(path, "1"), [place, f"want {kind}"]
            if "maximum" in schema:
                yield nested(path, schema["maximum"] + 1), [place]
                yield nested(path, schema["minimum"] - 1), [place]
        elif kind == "string":
            yield nested(path, 5), [place, "want string"]
            if "enum" in schema:
                yield nested(path, "wrong"), [place, "must be one of"]
        if isinstance(kind, list):
            yield nested(path, True), [place]


def by_hand():
    """The same, for what a pattern says; then what contradicts itself."""
    for values in (
        {"retention": "5"}, {"retention": "0s"}, {"retention": "5 m"}, {"retention": "5d"}, {"image": {"tag": "a b"}}, {"image": {"digest": "sha256:1"}},
        {"image": {"repository": "ghcr.io/a/b:1"}}, {"signals": {"gpu": {"devices": ["accel0"]}}}, {"signals": {"gpu": {"devices": ["/dev/a,/dev/b"]}}},
        {"extraArgs": ["retention=5m"]}, {"capabilities": ["CAP_bpf"]}, {"updateStrategy": {"maxUnavailable": "ten"}}, {"updateStrategy": {"maxUnavailable": 0}},
        {"podMonitor": {"interval": "1 minute"}}, {"logLevel": ""}, {"cgroupPath": "sys/fs/cgroup"}, {"fullnameOverride": "a" * 53},
        {"pods": "file"}, {"job": 'a"b'}, {"runbookURL": "docs/"}, {"runbookURL": "https://a"}, {"runbookURL": "https://a/$1/"}, {"ncclProfiler": {"hostPath": "opt"}},
        {"ncclProfiler": {"hostPath": "/a/.."}}, {"ncclProfiler": {"hostPath": "/."}}, {"nameOverride": "My name"}, {"fullnameOverride": "Upper"}, {"image": {"repository": "a.example/"}},
        {"networkPolicy": {"apiServer": {"ports": []}}}, {"updateStrategy": {"maxUnavailable": "0%"}},
        {"image": {"pullPolicy": "Sometimes"}}, {"updateStrategy": {"type": "Recreate"}}, {"seccompProfile": {"type": "Default"}},
        {"appArmorProfile": {"type": "Default"}}, {"tolerations": [{"operator": "Any"}]}, {"maxOwners": 0}, {"signals": {"gpu": {"cudaCalls": {"budget": 0}}}},
        {"port": 65536}, {"signals": {"encryption": {"timedEvery": 0}}}, {"signals": {"rdma": {"zeroFor": "1"}}}, {"networkPolicy": {"apiServer": {"ports": [0]}}},
        {"nameOverride": "a" * 64}, {"imagePullSecrets": [{}]}, {"extraEnv": [{"value": "a"}]}, {"extraEnv": [{"name": ""}]}, {"extraVolumes": [{}]},
        {"extraVolumeMounts": [{"name": "a"}]}, {"tolerations": [{"effect": "No"}]}, {"podMonitor": {"basicAuth": {"username": {"name": "a"}}}},
    ):  # fmt: skip
        [(key, value)] = values.items()
        yield values, [f"at '/{key}"]
    everything = {name: {"enabled": False} for name in ("tcp", "rdma", "encryption", "gpu", "nccl")}
    tls = {"web": {"config": {"tls_server_config": TLS}}}
    users = {"web": {"config": {"basic_auth_users": USERS}}}
    on = {"podMonitor": {"enabled": True}}
    for nobodys in "", "ghcr.io/chandra-exporter/chandra":
        yield {"image": {"repository": nobodys}}, ["image.repository: ", "make image", "push"]
    yield {"enabled": False}, ["enabled: ", "condition"]
    yield {"networkPolicy": {"enabled": True, "apiServer": {"ports": None}}}, ["networkPolicy.apiServer.ports: "]
    yield {"extraVolumes": [{"name": "web", "emptyDir": {}}]}, ["extraVolumes: web"]
    yield {"signals": everything}, ["signals: ", "enable one"]
    yield {"signals": {"gpu": {"enabled": False, "cudaCalls": {"enabled": True}}}}, ["signals.gpu.cudaCalls.enabled: ", "disabled"]
    yield merged(tls, {"web": {"existingSecret": "a"}}), ["web.config and web.existingSecret: ", "choose one"]
    yield {"web": {"https": True}}, ["web.https and web.clientCertificates: ", "web.existingSecret"]
    yield merged(tls, {"web": {"https": True}}), ["web.https and web.clientCertificates: "]
    yield {"web": {"existingSecret": "a", "clientCertificates": True}}, ["web.clientCertificates: ", "set web.https"]
    yield {"web": {"certificateSecret": "a"}}, ["web.certificateSecret: "]
    yield merged(users, {"web": {"certificateSecret": "a"}}), ["web.certificateSecret: "]
    yield {"serviceAccount": {"create": False}}, ["serviceAccount.name: ", "rbac.create=false"]
    yield {"hostNetwork": True, "networkPolicy": {"enabled": True}}, ["networkPolicy.enabled and hostNetwork: ", "choose one"]
    yield merged(tls, on), ["podMonitor.tlsConfig: ", "HTTPS"]
    yield merged(on, MONITOR_TLS), ["podMonitor.tlsConfig: ", "HTTP"]
    yield merged(users, on), ["podMonitor.basicAuth: "]
    yield {"extraEnv": [{"name": "NODE_NAME", "value": "a"}]}, ["extraEnv: NODE_NAME"]
    yield {"extraArgs": ["--retention=1m"]}, ["extraArgs: --retention"]


def refusals(chart):
    """Problems with how wrong values are refused, and how many there are."""
    made = [*by_schema(), *by_hand()]
    found = []
    for values, words in made:
        try:
            chart.render(merged(IMAGED, values), name="chandra", namespace="monitoring")
        except HelmError as error:
            # Below two lines that say which chart's schema it is; or behind the place of the template.
            lines = str(error).strip().splitlines()
            lines = lines[2:] if lines[0].startswith("values don't meet") else lines
            if len(lines) != 1 or not all(word in lines[0] for word in words):
                found.append(f"{json.dumps(values)}: not one line with {words}: {lines}")
        else:
            found.append(f"accepted, and should not be: {json.dumps(values)}")
    return found, len(made)


def schema_problems(chart):
    """Whether the schema and values.yaml have the same keys, all of them closed but for maps that are the user's own."""
    yield from (f"values.schema.json: {shown(path)} may be of any type" for path, schema in nodes() if "type" not in schema)
    numbers = [(path, schema) for path, schema in nodes() if schema.get("type") in ("integer", "number")]
    yield from (f"values.schema.json: {shown(path)} has no bounds" for path, schema in numbers if not {"minimum", "maximum"} <= schema.keys())
    for path, schema in nodes():
        closed = schema.get("additionalProperties") is not None
        if schema.get("type") == "object" and not closed and shown(path) not in OWN:
            yield f"values.schema.json: unknown keys are accepted at {shown(path)}"
    open_ = {shown(path) for path, schema in nodes() if schema.get("type") == "object" and "additionalProperties" not in schema}
    yield from (f"not in values.schema.json: {path}" for path in OWN - open_)

    def missing(schema, value, path):
        for key, inner in resolved(schema).get("properties", {}).items():
            if key not in value:
                yield path + key
            elif isinstance(value[key], dict) and value[key]:
                yield from missing(inner, value[key], f"{path}{key}.")

    # Read from charts that depend on this one; and optional fields of probes and of the API.
    optional = {"global", "enabled", "resources.claims", "ncclProfiler.resources.claims", "seccompProfile.localhostProfile"}
    optional |= {f"probes.{probe}.initialDelaySeconds" for probe in ("startup", "liveness", "readiness")}
    yield from (f"values.yaml lacks {path}" for path in missing(SCHEMA, chart.values, "") if path not in optional)
    web = SCHEMA["properties"]["web"]["properties"]["config"]["properties"]
    if set(web) != WEB[""] or set(web["tls_server_config"]["properties"]) != WEB["tls_server_config"]:
        yield "values.schema.json: web.config does not have the keys that the exporter knows"


def change(file, old, new):
    return file, old, new


# One line of the chart changed each.
CHANGES = [
    change("_helpers.tpl", '{{- $add = append $add "SYS_PTRACE" }}', '{{- $add = append $add "SYS_ADMIN" }}'),
    change("_helpers.tpl", "$s.nccl.enabled (and $s.gpu.enabled (or $s.gpu.cudaCalls.enabled $s.gpu.devices))", "$s.gpu.enabled"),
    change("_helpers.tpl", '{{- $add = append $add "SYS_RESOURCE" }}', '{{- $add = concat $add (list "SYS_RESOURCE" "NET_ADMIN") }}'),
    change("_helpers.tpl", "{{- or $s.rdma.enabled $s.encryption.enabled $s.gpu.enabled $s.nccl.enabled }}", "{{- true }}"),
    change("_helpers.tpl", 'printf "--disable=%s"', 'printf "--disabled=%s"'),
    change("_helpers.tpl", '"--max-owners=%d" (int64 .Values.maxOwners)', '"--max-owners=%v" .Values.maxOwners'),
    change("_helpers.tpl", '(list "--cuda-calls" ', '(list "--cuda-calls=true" '),
    change("_helpers.tpl", 'ternary "HTTPS" "HTTP" $web.https', '"HTTP"'),
    change("_helpers.tpl", 'hasPrefix "Require"', 'hasPrefix "Verify"'),
    change("_helpers.tpl", "app.kubernetes.io/instance: {{ .Release.Name | quote }}", "app.kubernetes.io/instance: {{ .Chart.AppVersion | quote }}"),
    change("_helpers.tpl", "trunc 52", "trunc 63"),
    change("_helpers.tpl", "merge $labels $root.Values.commonLabels", "mergeOverwrite $labels $root.Values.commonLabels"),
    change("_helpers.tpl", "privileged: false", "privileged: true"),
    change("_helpers.tpl", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
    change("_helpers.tpl", "readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true"),
    change("daemonset.yaml", "              drop: [ALL]\n", ""),
    change("daemonset.yaml", "              mountPath: /host/cgroup\n              readOnly: true", "              mountPath: /host/cgroup"),
    change("daemonset.yaml", "automountServiceAccountToken: {{ eq .Values.pods \"kube\" }}", "automountServiceAccountToken: true"),
    change("daemonset.yaml", "{{- if .Values.signals.gpu.enabled }}\n        - name: tracefs", "{{- if .Values.signals.nccl.enabled }}\n        - name: tracefs"),
    change("daemonset.yaml", "prometheus.io/port: {{ .Values.port | int64 | quote }}", "prometheus.io/port: {{ .Values.port }}"),
    change("daemonset.yaml", "fieldPath: spec.nodeName", "fieldPath: metadata.name"),
    change("daemonset.yaml", "containerPort: {{ .Values.port }}", "containerPort: {{ .Values.port | quote }}"),
    change("daemonset.yaml", ".Values.podLabels (include \"chandra.selectorLabels\" . | fromYaml)", "(include \"chandra.selectorLabels\" . | fromYaml) .Values.podLabels"),
    change("_helpers.tpl", '"nodeSelector" "affinity" "tolerations" }}', '"nodeSelector" "tolerations" }}'),
    change("daemonset.yaml", "      terminationGracePeriodSeconds:", "      terminationGracePeriod:"),
    change("rbac.yaml", "verbs: [get, list, watch]", "verbs: [get, list, watch, delete]"),
    change("rbac.yaml", "resources: [pods]", "resources: [pods, secrets]"),
    change("rbac.yaml", "name: {{ include \"chandra.serviceAccount\" . }}", "name: {{ include \"chandra.fullname\" . }}"),
    change("serviceaccount.yaml", "automountServiceAccountToken: false", "automountServiceAccountToken: true"),
    change("secret.yaml", "toYaml . | b64enc", "toYaml . | b64enc | b64enc"),
    change("podmonitor.yaml", "honorLabels: true", "honorLabels: false"),
    change("podmonitor.yaml", "replacement: {{ $.Values.job | quote }}", "replacement: chandra"),
    change("podmonitor.yaml", "__meta_kubernetes_pod_node_name", "__meta_kubernetes_node_name"),
    change("podmonitor.yaml", "      - {{ $.Release.Namespace }}", "      - monitoring"),
    change("prometheusrule.yaml", "(list $ $path) | nindent 2", "(list $ $path) | replace \"$labels.pod\" \"\" | nindent 2"),
    change("prometheusrule.yaml", "include \"chandra.file\" (list $ $path)", "$.Files.Get $path"),
    change("_helpers.tpl", "range list `\"` `\\\"`", "range list `\"`"),
    change("_helpers.tpl", "\"[${1}](%s${2})\"", "\"${1} (%s${2})\""),
    change("daemonset-nccl-profiler.yaml", "            capabilities:\n              drop: [ALL]\n", ""),
    change("daemonset-nccl-profiler.yaml", "path: {{ .Values.ncclProfiler.hostPath | quote }}", "path: /opt/chandra"),
    change("daemonset-nccl-profiler.yaml", "include \"chandra.pluginLabels\" .", "include \"chandra.selectorLabels\" ."),
    change("daemonset-nccl-profiler.yaml", "automountServiceAccountToken: false", "automountServiceAccountToken: true"),
    change("prometheusrule.yaml", "(ne $signal \"hubble\")", "(ne $signal \"exporter\")"),
    change("dashboards.yaml", "include \"chandra.file\" (list $ $path) |", "tpl (include \"chandra.file\" (list $ $path)) $ |"),
    change("dashboards.yaml", "grafana_folder:", "grafana_directory:"),
    change("networkpolicy.yaml", "policyTypes: [Ingress, Egress]", "policyTypes: [Ingress]"),
    change("networkpolicy.yaml", "- port: {{ $.Values.port }}", "- port: 9970"),
    change("networkpolicy.yaml", "  egress: []", "  egress: [{}]"),
]  # fmt: skip


def unnoticed(folder):
    """Changes of the chart that no case notices, those that are no changes, and how many there are."""
    chosen = [*cases()]
    # Most are noticed in the first few of these.
    chosen.sort(key=lambda case: sum(option == DEFAULT[choice] for choice, option in case.items()))

    def notices(chart, case):
        try:
            objects = render(chart, case)
            return any(problems(case, objects)) or any(invalid(objects))
        except HelmError:
            return True

    for number, (file, old, new) in enumerate(CHANGES):
        copy = folder / str(number)
        shutil.copytree(CHART, copy)
        template = copy / "templates" / file
        text = template.read_text()
        if text.count(old) != 1:
            yield f"templates/{file} has not once: {old}"
            continue
        template.write_text(text.replace(old, new))
        with Chart.load(copy) as chart:
            if not any(notices(chart, case) for case in chosen):
                yield f"templates/{file}, unnoticed: {old} → {new}"
        shutil.rmtree(copy)
