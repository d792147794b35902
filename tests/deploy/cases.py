# SPDX-License-Identifier: Apache-2.0
"""Choices among the chart's values, all combinations of two of them, and what has to come of each."""

import base64
import itertools
import json
import random
import re
from collections import Counter

import yaml

import kubernetes_validate
from repository import DASHBOARDS, FLAGS, IMAGE, IMAGED, NEEDS, RULES, SIGNALS, WEB, listed, rendered

NAMESPACE = "observability"
# Of the versions that Chart.yaml allows the oldest, and the newest that is known.
KUBERNETES = ["1.25", "1.37"]

TLS = {"cert_file": "/etc/chandra/tls/tls.crt", "key_file": "/etc/chandra/tls/tls.key"}
DEMANDED = {"client_auth_type": "RequireAndVerifyClientCert", "client_ca_file": "/etc/chandra/tls/ca.crt"}
USERS = {"prometheus": "$2y$10$abcdefghijklmnopqrstuuJ0d7nFv8mPq8Yk5v4o3n2m1l0k9j8h7"}
SECRET_KEY = {"name": "scrape", "key": "password"}
MONITOR_TLS = {"podMonitor": {"tlsConfig": {"serverName": "chandra", "ca": {"secret": {"name": "ca", "key": "ca.crt"}}}}}
MONITOR_USER = {"podMonitor": {"basicAuth": {"username": SECRET_KEY, "password": SECRET_KEY}}}
EXTRAS = {
    "nameOverride": "",
    "commonLabels": {"team": "platform", "app.kubernetes.io/name": "theirs"},
    "image": {"digest": "sha256:" + 64 * "0", "pullPolicy": "Always", "repository": "registry.example:5000/mirror/chandra"},
    "imagePullSecrets": [{"name": "registry"}],
    "retention": "90s",
    "maxOwners": 1000000,
    "logLevel": "info,chandra::pods=debug",
    "showPaths": True,
    "extraArgs": ["--disable=tcp"],
    "extraEnv": [{"name": "RUST_BACKTRACE", "value": "1"}],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
    "port": 19970,
    "job": "gpu/nodes-1",
    "runbookURL": "https://git.example/runbooks/",
    "ncclProfiler": {"hostPath": "/opt/gpu", "resources": {"limits": {"memory": "64Mi"}}},
    "serviceAccount": {"annotations": {"example.com/role": "reader"}},
    "cgroupPath": "/sys/fs/cgroup/unified",
    "seccompProfile": {"type": "Localhost", "localhostProfile": "chandra.json"},
    "seLinuxOptions": {"type": "spc_t"},
    "podLabels": {"tier": "node", "app.kubernetes.io/instance": "theirs"},
    "podAnnotations": {"example.com/note": "1"},
    "prometheusAnnotations": True,
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "nodeSelector": {"pool": "gpu"},
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
            }
        }
    },
    "priorityClassName": "system-node-critical",
    "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"cpu": "2"}},
    "terminationGracePeriodSeconds": 30,
    "probes": {"liveness": {"initialDelaySeconds": 5}},
    "podMonitor": {
        "annotations": {"a": "b"},
        "interval": "15s",
        "scrapeTimeout": "10s",
        "labels": {"prometheus": "main", "release": "mine"},
        "relabelings": [{"targetLabel": "cluster", "replacement": "a"}],
        "metricRelabelings": [{"sourceLabels": ["__name__"], "regex": "x", "action": "drop"}],
    },
    "prometheusRule": {"annotations": {"a": "b"}, "labels": {"release": "mine"}},
    "dashboards": {"annotations": {"k8s-sidecar-target-directory": "/tmp/x"}, "labels": {"grafana_dashboard": "yes"}},
}

on = lambda name: {"signals": {name: {"enabled": True}}}
off = lambda name: {"signals": {name: {"enabled": False}}}
# By choice the options, and their values. The first option of each is the chart's default.
CHOICES = {name: {"on": on(name), "off": off(name)} for name in SIGNALS if name != "gpu"} | {
    "gpu": {
        "on": {},
        "off": off("gpu"),
        "calls": {"signals": {"gpu": {"cudaCalls": {"enabled": True, "budget": 0.00001}}}},
        "devices": {"signals": {"gpu": {"devices": ["/dev/accel0", "/dev/accel1"]}}},
    },
    "salt": {
        "made": {},
        "theirs": {"signals": {"nccl": {"salt": {"existingSecret": "salt"}}}},
        "none": {"signals": {"nccl": {"salt": {"create": False}}}},
    },
    "packets": {"default": {}, "others": {"signals": {"rdma": {"zeroFor": "0s"}, "encryption": {"timedEvery": 1000000, "vxlanPort": 4789, "genevePort": 65535}}}},
    "pods": {"kube": {}, "none": {"pods": "none"}, "file": {"pods": "/etc/pods.json"}},
    "plugin": {"off": {}, "on": {"ncclProfiler": {"enabled": True}}},
    "account": {
        "made": {},
        "named": {"serviceAccount": {"name": "reader"}},
        "theirs": {"serviceAccount": {"create": False, "name": "theirs"}},
    },
    "role": {"made": {}, "theirs": {"rbac": {"create": False}}},
    "network": {
        "pod": {},
        "host": {"hostNetwork": True},
        "policy": {"networkPolicy": {"enabled": True}},
        "open": {"networkPolicy": {"enabled": True, "from": [], "dns": True, "apiServer": {"cidrs": ["10.0.0.0/8"], "ports": [6443]}}},
    },
    "web": {
        "plain": {},
        "headers": {"web": {"config": {"http_server_config": {"headers": {"X-Frame-Options": "deny"}}}}},
        "users": {"web": {"config": {"basic_auth_users": USERS}}} | MONITOR_USER,
        "tls": {"web": {"config": {"tls_server_config": TLS}, "certificateSecret": "tls"}} | MONITOR_TLS,
        "mtls": {"web": {"config": {"tls_server_config": TLS | DEMANDED, "rate_limit": {"interval": "1s", "burst": 20}}}} | MONITOR_TLS,
        "secret": {"web": {"existingSecret": "web"}},
        "secret-tls": {"web": {"existingSecret": "web", "https": True, "certificateSecret": "tls"}} | MONITOR_TLS,
        "secret-mtls": {"web": {"existingSecret": "web", "https": True, "clientCertificates": True}} | MONITOR_TLS,
    },
    "monitor": {"off": {}, "on": {"podMonitor": {"enabled": True}}, "elsewhere": {"podMonitor": {"enabled": True, "namespace": "monitoring"}}},
    "rules": {
        "off": {},
        "on": {"prometheusRule": {"enabled": True}},
        "elsewhere": {"prometheusRule": {"enabled": True, "namespace": "monitoring", "hubble": False}},
    },
    "dashboards": {
        "off": {},
        "on": {"dashboards": {"enabled": True}},
        "elsewhere": {"dashboards": {"enabled": True, "namespace": "grafana", "folder": "Chandra"}},
    },
    "name": {"chandra": {}, "other": {}, "override": {"nameOverride": "probe"}, "full": {"fullnameOverride": "sees"}, "long": {}, "number": {}},
    "update": {"rolling": {}, "number": {"updateStrategy": {"maxUnavailable": 3}}, "delete": {"updateStrategy": {"type": "OnDelete"}}},
    "profile": {"default": {}, "unconfined": {"appArmorProfile": {"type": "Unconfined"}, "seccompProfile": {"type": "Unconfined"}}},
    "extras": {"none": {}, "all": EXTRAS},
}
DEFAULT = {choice: next(iter(options)) for choice, options in CHOICES.items()}
RELEASES = {"other": "monitor-nodes", "number": "7", "long": "a-release-with-a-name-of-fifty-three-characters-in-all"[:53]}


def merged(*maps):
    result = {}
    for values in maps:
        for key, value in values.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def values_of(case):
    # What a case chooses by name wins over what comes with the extras.
    return merged(IMAGED, CHOICES["extras"][case["extras"]], *(CHOICES[choice][option] for choice, option in case.items() if choice != "extras"))


def cases():
    """The defaults; each set of signals; any two options of different choices in one case at least."""
    yield dict(DEFAULT)
    names = {name: CHOICES[name] for name in SIGNALS}
    for chosen in itertools.product(*names.values()):
        case = DEFAULT | dict(zip(names, chosen))
        if any(case[name] != "off" for name in SIGNALS):
            yield case | {"rules": "on"}
    luck = random.Random(0)
    pairs = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(CHOICES, 2)
        for x in CHOICES[a]
        for y in CHOICES[b]
    }
    while pairs:
        # The best of some that each begin with a pair that is left.
        best, most = None, set()
        for first in luck.sample(sorted(pairs, key=sorted), min(8, len(pairs))):
            case = dict(first)
            for choice in luck.sample(list(CHOICES), len(CHOICES)):
                if choice not in case:
                    gain = lambda option: sum(frozenset(((choice, option), other)) in pairs for other in case.items())
                    options = luck.sample(list(CHOICES[choice]), len(CHOICES[choice]))
                    case[choice] = max(options, key=gain)
            if all(case[name] == "off" for name in SIGNALS):
                # Refused; the pairs that it loses are still left.
                case[luck.choice([name for name in SIGNALS if (name, "off") not in first])] = "on"
            new = {frozenset(pair) for pair in itertools.combinations(case.items(), 2)} & pairs
            if len(new) > len(most):
                best, most = case, new
        pairs -= most
        yield {choice: best[choice] for choice in CHOICES}


def render(chart, case):
    """The rendered objects by kind and name."""
    release = RELEASES.get(case["name"], "chandra")
    return by_name(listed(chart.render(values_of(case), name=release, namespace=NAMESPACE)))


def by_name(made):
    named = {(o["kind"], o["metadata"]["name"]): o for o in made}
    assert len(named) == len(made), "two objects of one kind and name"
    return named


def fullname(case):
    release = RELEASES.get(case["name"], "chandra")
    names = {"chandra": "chandra", "other": "monitor-nodes-chandra", "number": "7-chandra", "override": "chandra-probe", "full": "sees"}
    return names.get(case["name"], (release + "-chandra")[:52].rstrip("-"))


def signals_of(case):
    return {name for name in SIGNALS if case[name] != "off"}


def is_salted(case):
    return case["nccl"] != "off" and case["salt"] != "none"


def problems(case, objects):
    """What is not as the case wants it."""
    name, values = fullname(case), values_of(case)
    extras = EXTRAS if case["extras"] == "all" else {}
    signals, kube = signals_of(case), case["pods"] == "kube"
    https, mtls = "tls" in case["web"], "mtls" in case["web"]
    account = {"made": name, "named": "reader", "theirs": "theirs"}[case["account"]]
    selector = {
        "app.kubernetes.io/name": "probe" if case["name"] == "override" else "chandra",
        "app.kubernetes.io/instance": RELEASES.get(case["name"], "chandra"),
    }

    # Which objects there are.
    wanted = {("DaemonSet", name)}
    plugin = name[:38].rstrip("-") + "-nccl-profiler"
    if case["plugin"] == "on":
        wanted.add(("DaemonSet", plugin))
    if case["account"] != "theirs":
        wanted.add(("ServiceAccount", account))
    if kube and case["role"] == "made":
        wanted |= {("ClusterRole", name), ("ClusterRoleBinding", name)}
    if case["web"] in ("headers", "users", "tls", "mtls"):
        wanted.add(("Secret", f"{name}-web"))
    if is_salted(case) and case["salt"] == "made":
        wanted.add(("Secret", f"{name}-nccl-salt"))
    if case["monitor"] != "off":
        wanted.add(("PodMonitor", name))
    if case["network"] in ("policy", "open"):
        wanted.add(("NetworkPolicy", name))
    # Rules that are of no signal are always there, but for Hubble's.
    rules = signals | set(RULES) - set(SIGNALS)
    rules = {"off": set(), "on": rules, "elsewhere": rules - {"hubble"}}[case["rules"]]
    wanted |= {("PrometheusRule", f"{name}-{signal}") for signal in rules}
    dashboards = {} if case["dashboards"] == "off" else DASHBOARDS
    boards = {file: file.removesuffix(".json").removeprefix("chandra-").replace("chandra", "overview") for file in dashboards}
    wanted |= {("ConfigMap", f"{name}-dashboard-{board}") for board in boards.values()}
    if wanted != set(objects):
        yield from (f"{kind} {of.replace(name, '…', 1)} is missing" for kind, of in sorted(wanted - set(objects)))
        yield from (f"{kind} {of.replace(name, '…', 1)} is too many" for kind, of in sorted(set(objects) - wanted))
        return

    # All objects.
    elsewhere = {
        "PodMonitor": "monitoring" if case["monitor"] == "elsewhere" else NAMESPACE,
        "PrometheusRule": "monitoring" if case["rules"] == "elsewhere" else NAMESPACE,
        "ConfigMap": "grafana" if case["dashboards"] == "elsewhere" else NAMESPACE,
    }
    for (kind, of), o in objects.items():
        metadata, labels = o["metadata"], o["metadata"]["labels"]
        want = None if kind.startswith("Cluster") else elsewhere.get(kind, NAMESPACE)
        if metadata.get("namespace") != want:
            yield f"{kind} {of}: namespace {metadata.get('namespace')}, not {want}"
        # Names of pods, and labels of the DaemonSet's revisions.
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", of) or kind == "DaemonSet" and len(of) > 52:
            yield f"{kind} {of}: its name"
        if not (selector.items() <= labels.items() and {"helm.sh/chart", "app.kubernetes.io/managed-by"} <= labels.keys()):
            yield f"{kind} {of}: labels {labels}"
        if extras and labels.get("team") != "platform":
            yield f"{kind} {of}: commonLabels"
        for text in [*labels.values(), *metadata.get("annotations", {}).values()]:
            if not isinstance(text, str):
                yield f"{kind} {of}: {text!r} is no string"
        if any(len(text) > 63 or not re.fullmatch(r"([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?", text) for text in labels.values()):
            yield f"{kind} {of}: the form of a label"

    yield from daemonset(objects["DaemonSet", name], case, values, extras, selector, account)
    if case["plugin"] == "on":
        yield from installer(objects["DaemonSet", plugin]["spec"], objects["DaemonSet", name]["spec"]["template"]["spec"], extras, selector)
    if ("Secret", f"{name}-nccl-salt") in objects:
        salt = base64.b64decode(objects["Secret", f"{name}-nccl-salt"]["data"]["salt"])
        if len(salt) != 32:
            yield f"Secret: a salt of {len(salt)} bytes"
    yield from access(objects, name, case, account)

    if case["web"] in ("headers", "users", "tls", "mtls"):
        secret = objects["Secret", f"{name}-web"]["data"]
        file = yaml.safe_load(base64.b64decode(secret["web.yaml"]))
        if set(secret) != {"web.yaml"} or file != values["web"]["config"] or set(file) - WEB[""]:
            yield f"Secret: {secret}"

    if case["monitor"] != "off":
        monitor = objects["PodMonitor", name]
        spec = monitor["spec"]
        [endpoint] = spec["podMetricsEndpoints"]
        expected = {
            "port": "metrics",
            "path": "/metrics",
            "scheme": "https" if https else "http",
            "honorLabels": True,
            "relabelings": [
                {"sourceLabels": ["__meta_kubernetes_pod_node_name"], "targetLabel": "node"},
                {"targetLabel": "job", "replacement": extras.get("job", "chandra")},
                *extras.get("podMonitor", {}).get("relabelings", []),
            ],
        }
        given = values.get("podMonitor", {})
        for key in "interval", "scrapeTimeout", "tlsConfig", "basicAuth", "metricRelabelings":
            if key in given:
                expected[key] = given[key]
        if endpoint != expected:
            yield f"PodMonitor: {endpoint}, not {expected}"
        if spec["selector"] != {"matchLabels": selector} or spec["namespaceSelector"] != {"matchNames": [NAMESPACE]}:
            yield f"PodMonitor: selects {spec['selector']} in {spec['namespaceSelector']}"
        release = "mine" if extras else "kube-prometheus-stack"
        if monitor["metadata"]["labels"].get("release") != release or extras and monitor["metadata"]["labels"].get("prometheus") != "main":
            yield "PodMonitor: the labels by which it is found"

    rules_of, dashboards_of = rendered(extras["job"], extras["runbookURL"]) if extras else (RULES, DASHBOARDS)
    for signal in rules:
        rule = objects["PrometheusRule", f"{name}-{signal}"]
        if rule["spec"] != rules_of[signal]:
            yield f"rules of {signal} are not what the mixin makes"
        if rule["metadata"]["labels"].get("release") != ("mine" if extras else "kube-prometheus-stack"):
            yield f"rules of {signal}: the labels by which they are found"

    for file, board in boards.items():
        o = objects["ConfigMap", f"{name}-dashboard-{board}"]
        if o["data"] != {file: dashboards_of[file]}:
            yield f"dashboard {board} is not what the mixin makes"
        # The bound is 1 MiB, for the object.
        if len(json.dumps(o)) > 1 << 20:
            yield f"dashboard {board} is too large for a ConfigMap"
        if o["metadata"]["labels"].get("grafana_dashboard") != ("yes" if extras else "1"):
            yield f"dashboard {board}: the label by which it is found"
        if o["metadata"].get("annotations", {}).get("grafana_folder") != values.get("dashboards", {}).get("folder"):
            yield f"dashboard {board}: its folder"

    if case["network"] in ("policy", "open"):
        yield from policy(objects["NetworkPolicy", name]["spec"], case, kube, extras, selector)


def same(what, found, wanted):
    if found != wanted:
        yield f"{what}: {found}, not {wanted}"


def daemonset(o, case, values, extras, selector, account):
    spec, template = o["spec"], o["spec"]["template"]
    pod = template["spec"]
    [container] = pod["containers"]
    security = container["securityContext"]
    signals, kube = signals_of(case), case["pods"] == "kube"
    https, mtls = "tls" in case["web"], "mtls" in case["web"]
    port = extras.get("port", 9970)

    yield from same("selector", spec["selector"], {"matchLabels": selector})
    labels = merged(extras.get("commonLabels", {}), extras.get("podLabels", {}), selector)
    yield from same("labels of pods", template["metadata"]["labels"], labels)
    annotations = {"kubectl.kubernetes.io/default-container": "chandra"}
    if extras:
        scheme = "https" if https else "http"
        annotations |= {f"prometheus.io/{key}": text for key, text in dict(scrape="true", port=str(port), path="/metrics", scheme=scheme).items()}
        annotations |= extras["podAnnotations"]
    yield from same("annotations of pods", template["metadata"]["annotations"], annotations)

    # What it may do.
    settings = {case["gpu"]} & {"calls", "devices"}
    capabilities = {"SYS_RESOURCE"}.union(*(NEEDS[of] for of in signals | settings))
    yield from same("capabilities", set(security["capabilities"]["add"]), capabilities)
    yield from same("capabilities, each once", len(security["capabilities"]["add"]), len(capabilities))
    yield from same("dropped capabilities", security["capabilities"].get("drop"), ["ALL"])
    for key, wanted in dict(privileged=False, allowPrivilegeEscalation=False, readOnlyRootFilesystem=True, runAsUser=0, runAsNonRoot=False).items():
        yield from same(key, security.get(key), wanted)
    seccomp = {"type": "RuntimeDefault"}
    if extras or case["profile"] == "unconfined":
        seccomp = merged(extras.get("seccompProfile", {}), CHOICES["profile"][case["profile"]].get("seccompProfile", {}))
    yield from same("seccomp", security["seccompProfile"], seccomp)
    yield from same("AppArmor", security.get("appArmorProfile"), {"type": "Unconfined"} if case["profile"] == "unconfined" else None)
    yield from same("SELinux", security.get("seLinuxOptions"), extras.get("seLinuxOptions"))
    yield from same("hostPID", pod["hostPID"], signals != {"tcp"})
    yield from same("hostIPC", pod.get("hostIPC", False), False)
    yield from same("hostNetwork", pod["hostNetwork"], case["network"] == "host")
    yield from same("dnsPolicy", pod["dnsPolicy"], "ClusterFirstWithHostNet" if case["network"] == "host" else "ClusterFirst")
    yield from same("account", pod["serviceAccountName"], account)
    yield from same("token", pod["automountServiceAccountToken"], kube)

    # Files.
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    yield from same("volumes that are mounted", set(mounts), set(volumes))
    hosts = {volume["hostPath"]["path"]: volume["hostPath"]["type"] for volume in volumes.values() if "hostPath" in volume}
    paths = {extras.get("cgroupPath", "/sys/fs/cgroup")} | ({"/sys/kernel/tracing"} if "gpu" in signals else set())
    yield from same("host paths", hosts, dict.fromkeys(paths, "Directory"))
    yield from (f"volume {name} can be written to" for name, mount in mounts.items() if mount.get("readOnly") is not True)
    mounted = {mount["mountPath"]: volumes.get(name, {}) for name, mount in mounts.items()}
    of_host = {path: volume["hostPath"]["path"] for path, volume in mounted.items() if "hostPath" in volume}
    wanted = {"/host/cgroup": extras.get("cgroupPath", "/sys/fs/cgroup")} | ({"/sys/kernel/tracing": "/sys/kernel/tracing"} if "gpu" in signals else {})
    yield from same("mounts of host paths", of_host, wanted)
    secrets = {path: volume["secret"]["secretName"] for path, volume in mounted.items() if "secret" in volume}
    yield from (f"{path}: who may read the secret" for path, volume in mounted.items() if "secret" in volume and volume["secret"]["defaultMode"] != 0o400)
    wanted = {}
    if case["web"] != "plain":
        wanted["/etc/chandra/web"] = "web" if case["web"].startswith("secret") else o["metadata"]["name"] + "-web"
    if case["web"] in ("tls", "secret-tls"):
        wanted["/etc/chandra/tls"] = "tls"
    if is_salted(case):
        wanted["/etc/chandra/nccl"] = "salt" if case["salt"] == "theirs" else o["metadata"]["name"] + "-nccl-salt"
    yield from same("secrets", secrets, wanted)

    # Flags and variables.
    given = values.get("signals", {})
    flags = {
        "--web.listen-address": f":{port}",
        "--pods": values.get("pods", "kube"),
        "--retention": extras.get("retention", "5m"),
        "--max-owners": str(extras.get("maxOwners", 1200)),
        "--log.level": extras.get("logLevel", "info"),
    }
    if extras.get("showPaths"):
        flags["--web.show-paths"] = None
    if case["web"] != "plain":
        flags["--web.config.file"] = "/etc/chandra/web/web.yaml"
    if "rdma" in signals:
        flags["--rdma.zero-for"] = given.get("rdma", {}).get("zeroFor", "60s")
    if "encryption" in signals:
        others = case["packets"] == "others"
        flags["--encryption.timed-every"] = "1000000" if others else "32"
        flags["--encryption.vxlan-port"] = "4789" if others else "8472"
        flags["--encryption.geneve-port"] = "65535" if others else "6081"
    if case["gpu"] == "calls":
        flags |= {"--cuda-calls": None, "--cuda-calls.budget": "1e-05"}
    listed = [("--disable", name) for name in SIGNALS if name not in signals]
    listed += [("--gpu.device", path) for path in given.get("gpu", {}).get("devices", [])]
    listed += [("--disable", "tcp")] if extras else []
    found = [tuple(argument.split("=", 1)) if "=" in argument else (argument, None) for argument in container["args"]]
    wanted = Counter([*flags.items(), *listed])
    yield from (f"flag {flag} {value} is missing" for flag, value in wanted - Counter(found))
    yield from (f"flag {flag} {value} is too many" for flag, value in Counter(found) - wanted)
    for flag, value in found:
        if flag not in FLAGS or FLAGS[flag].switch != (value is None):
            yield f"chandra has no flag {flag} with the value {value}"
    environment = {variable["name"]: variable for variable in container["env"]}
    yield from same("variables, each once", len(environment), len(container["env"]))
    yield from (f"the value of {name} is no string" for name, variable in environment.items() if not isinstance(variable.get("value", ""), str))
    yield from same("place of cgroups", environment[FLAGS["--path.cgroupfs"].variable].get("value"), "/host/cgroup")
    node = environment.pop(FLAGS["--node-name"].variable, None)
    reference = {"valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    yield from same("node", node, {"name": FLAGS["--node-name"].variable} | reference if kube else None)
    own = {FLAGS["--path.cgroupfs"].variable} | ({"RUST_BACKTRACE"} if extras else set())
    if is_salted(case):
        variable = FLAGS["--nccl.salt-file"].variable
        own |= {variable}
        yield from same("place of the salt", environment.get(variable, {}).get("value"), "/etc/chandra/nccl/salt")
    yield from same("variables", set(environment), own)

    # Port and probes.
    yield from same("ports", container["ports"], [{"name": "metrics", "containerPort": port, "protocol": "TCP"}])
    for probe, path in dict(startupProbe="/livez", livenessProbe="/livez", readinessProbe="/readyz").items():
        http = {"path": path, "port": "metrics", "scheme": "HTTPS" if https else "HTTP"}
        do = {key: container[probe].get(key) for key in ("httpGet", "tcpSocket", "exec")}
        wanted = {"httpGet": None, "tcpSocket": {"port": "metrics"}} if mtls else {"httpGet": http, "tcpSocket": None}
        yield from same(probe, do, wanted | {"exec": None})
    if extras:
        yield from same("delay", container["livenessProbe"].get("initialDelaySeconds"), 5)

    # Where and how it runs.
    digest = "registry.example:5000/mirror/chandra:0.1.0@sha256:" + 64 * "0"
    yield from same("image", container["image"], digest if extras else IMAGE + ":0.1.0")
    yield from same("pull policy", container["imagePullPolicy"], "Always" if extras else "IfNotPresent")
    yield from same("update", spec["updateStrategy"], {
        "rolling": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "10%"}},
        "number": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 3}},
        "delete": {"type": "OnDelete"},
    }[case["update"]])
    yield from same("tolerations", pod["tolerations"], extras.get("tolerations", [{"operator": "Exists"}]))
    yield from same("nodes", pod["nodeSelector"], {"kubernetes.io/os": "linux"} | extras.get("nodeSelector", {}))
    yield from same("grace", pod.get("terminationGracePeriodSeconds"), extras.get("terminationGracePeriodSeconds", 40))
    for key in "affinity", "priorityClassName", "imagePullSecrets":
        yield from same(key, pod.get(key), extras.get(key))
    resources = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "192Mi"}}
    yield from same("resources", container["resources"], merged(resources, extras.get("resources", {})))


def installer(spec, exporter, extras, selector):
    """What puts the profiler plugin on the node: nothing of it is selected with the exporter's pods."""
    template = spec["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    yield from same("selector of the plugin", spec["selector"]["matchLabels"].items() <= labels.items() and not selector.items() <= labels.items(), True)
    for key in "tolerations", "nodeSelector", "affinity", "priorityClassName", "imagePullSecrets":
        yield from same(f"{key} of the plugin", pod.get(key), exporter.get(key))
    yield from same("token of the plugin", pod["automountServiceAccountToken"], False)
    yield from (f"the plugin has {key}" for key in ("hostPID", "hostNetwork", "serviceAccountName") if key in pod)
    [volume], [container] = pod["volumes"], pod["containers"]
    yield from same("folder of the plugin", volume["hostPath"], {"path": "/opt/gpu" if extras else "/opt/chandra", "type": "DirectoryOrCreate"})
    yield from same("mounts of the plugin", container["volumeMounts"], [{"name": volume["name"], "mountPath": "/host/nccl-profiler"}])
    yield from same("arguments of the plugin", container["args"], ["install-nccl-profiler", "--keep", "/host/nccl-profiler"])
    for key in "image", "imagePullPolicy":
        yield from same(f"{key} of the plugin", container[key], exporter["containers"][0][key])
    limits = {"memory": "64Mi" if extras else "32Mi"}
    yield from same("resources of the plugin", container["resources"], {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": limits})
    wanted = {
        "privileged": False, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsUser": 0, "runAsGroup": 0, "runAsNonRoot": False,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    security = {key: value for key, value in container["securityContext"].items() if key != "seLinuxOptions"}
    yield from same("security of the plugin", security, wanted)


def access(objects, name, case, account):
    if case["account"] != "theirs":
        made = objects["ServiceAccount", account]
        if made["automountServiceAccountToken"] is not False:
            yield "ServiceAccount: its token is mounted by whoever uses it"
        if case["extras"] == "all" and made["metadata"].get("annotations") != EXTRAS["serviceAccount"]["annotations"]:
            yield "ServiceAccount: annotations"
    if ("ClusterRole", name) not in objects:
        return
    rules = objects["ClusterRole", name]["rules"]
    if rules != [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]:
        yield f"ClusterRole: {rules}"
    binding = objects["ClusterRoleBinding", name]
    if binding["roleRef"] != {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}:
        yield f"ClusterRoleBinding: {binding['roleRef']}"
    if binding["subjects"] != [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]:
        yield f"ClusterRoleBinding: {binding['subjects']}"


def policy(spec, case, kube, extras, selector):
    tcp = lambda port: {"port": port, "protocol": "TCP"}
    limited = case["network"] == "policy"
    ingress = {"ports": [tcp(extras.get("port", 9970))]}
    if limited:
        ingress["from"] = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    server = {"ports": [tcp(443), tcp(6443)]} if limited else {"ports": [tcp(6443)], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}
    dns = {"ports": [{"port": 53, "protocol": "UDP"}, tcp(53)]}
    wanted = {
        "podSelector": {"matchLabels": selector},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [ingress],
        "egress": ([server] if kube else []) + ([] if limited else [dns]),
    }
    if spec != wanted:
        yield f"NetworkPolicy: {spec}, not {wanted}"


_seen = set()


def invalid(objects, versions=KUBERNETES):
    """What the API server of a version would refuse, each object once."""
    for (kind, name), o in objects.items():
        if o["apiVersion"].startswith("monitoring.coreos.com/"):
            continue
        for version in versions:
            text = version + json.dumps(o, sort_keys=True)
            # Of 1.30; older ones leave the field out.
            old = version == KUBERNETES[0] and '"appArmorProfile"' in text
            if text in _seen or old:
                continue
            _seen.add(text)
            try:
                kubernetes_validate.validate(o, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                yield f"{kind} {name}, Kubernetes {version}: {error.message}"
