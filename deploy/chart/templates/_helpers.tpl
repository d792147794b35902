{{/* Gives .Values what the values of an older chart lack (helm upgrade --reuse-values): each template that reads them begins with
it. Lists, and the maps that are named here, are the user's own: what a null has deleted there is gone. files/values.yaml is
this chart's values.yaml. */}}
{{- define "chandra.complete" -}}
{{- include "chandra.fill" (list .Values (.Files.Get "files/values.yaml" | fromYaml) "") }}
{{- end }}

{{- define "chandra.fill" -}}
{{- $values := index . 0 }}
{{- $path := index . 2 }}
{{- $own := list "podMonitor.labels" "prometheusRule.labels" "dashboards.labels" "nodeSelector" "resources" "probes.startup" "probes.liveness" "probes.readiness" "ncclProfiler.resources" }}
{{- range $key, $default := index . 1 }}
{{- if not (or (has (print $path $key) $own) (kindIs "slice" $default)) }}
{{- if not (hasKey $values $key) }}
{{- $_ := set $values $key $default }}
{{- else if kindIs "map" $default }}
{{- include "chandra.fill" (list (get $values $key) $default (printf "%s%s." $path $key)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "chandra.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Names of pods are made of it, and of objects that end in a signal or a dashboard. */}}
{{- define "chandra.fullname" -}}
{{- $name := include "chandra.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- end }}

{{/* Immutable in a DaemonSet: nothing that an upgrade may change. */}}
{{- define "chandra.selectorLabels" -}}
app.kubernetes.io/name: {{ include "chandra.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* Of the pods that put the profiler plugin on nodes: no selector of the others may hold for them. */}}
{{- define "chandra.pluginLabels" -}}
{{- $labels := include "chandra.selectorLabels" . | fromYaml }}
{{- toYaml (set $labels "app.kubernetes.io/name" (printf "%s-nccl-profiler" (include "chandra.name" . | trunc 49 | trimSuffix "-"))) }}
{{- end }}

{{- define "chandra.pluginName" -}}
{{- include "chandra.fullname" . | trunc 38 | trimSuffix "-" }}-nccl-profiler
{{- end }}

{{/* What images need, and on which nodes pods go, as YAML. */}}
{{- define "chandra.placement" -}}
{{- $all := dict }}
{{- range list "imagePullSecrets" "priorityClassName" "nodeSelector" "affinity" "tolerations" }}
{{- $value := get $.Values . }}
{{- if $value }}
{{- $_ := set $all . $value }}
{{- end }}
{{- end }}
{{- if $all }}
{{- toYaml $all }}
{{- end }}
{{- end }}

{{/* Labels of an object, as YAML. usage: include "chandra.labels" (list . MAP...), of which the first that has a key wins */}}
{{- define "chandra.labels" -}}
{{- $root := first . }}
{{- $labels := include "chandra.selectorLabels" $root | fromYaml }}
{{- $_ := set $labels "app.kubernetes.io/version" ($root.Chart.AppVersion | replace "+" "_") }}
{{- $_ := set $labels "app.kubernetes.io/managed-by" $root.Release.Service }}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-") }}
{{- range rest . }}
{{- $labels = merge $labels (default dict .) }}
{{- end }}
{{- toYaml (merge $labels $root.Values.commonLabels) }}
{{- end }}

{{- define "chandra.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "chandra.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "chandra.image" -}}
{{- /* The second was a default, and is nobody's: whoever takes the name would run on every node. */}}
{{- if has .Values.image.repository (list "" "ghcr.io/chandra-exporter/chandra") }}
{{- fail "image.repository: it is required, since no image is published: build one with `make image`, push it to a registry of yours (docs/image.md), and set image.repository=registry.example/chandra" }}
{{- end }}
{{- $image := printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- with .Values.image.digest }}
{{- $image = printf "%s@%s" $image . }}
{{- end }}
{{- $image }}
{{- end }}

{{/* The capabilities that the enabled signals need, as a JSON list. docs/security.md says what was tried. */}}
{{- define "chandra.capabilities" -}}
{{- $s := .Values.signals }}
{{- $add := list }}
{{- /* bpf(2): load programs, make maps. */}}
{{- $add = append $add "BPF" }}
{{- /* Programs that trace: tracepoints, kprobes, iterators. */}}
{{- $add = append $add "PERFMON" }}
{{- /* kprobes where kernel.perf_event_paranoid is above 2 (Debian, Ubuntu); uprobes, on kernels since 2025; entering network
       namespaces for rdma; /proc/PID/map_files for nccl and calls of CUDA. tcp has none of these. */}}
{{- if or $s.rdma.enabled $s.encryption.enabled $s.gpu.enabled $s.nccl.enabled }}
{{- $add = append $add "SYS_ADMIN" }}
{{- end }}
{{- /* What /proc tells of other processes: mappings for nccl and calls of CUDA, network namespaces for rdma, the host's
       /dev (/proc/1/root) for devices that are named. */}}
{{- if or $s.rdma.enabled $s.nccl.enabled (and $s.gpu.enabled (or $s.gpu.cudaCalls.enabled $s.gpu.devices)) }}
{{- $add = append $add "SYS_PTRACE" }}
{{- end }}
{{- /* 5.10 charges maps to RLIMIT_MEMLOCK, which the exporter raises for itself. */}}
{{- $add = append $add "SYS_RESOURCE" }}
{{- default $add .Values.capabilities | toJson }}
{{- end }}

{{/* "true" where a signal follows processes of the host: tcp alone knows its owners by their cgroups. */}}
{{- define "chandra.hostPID" -}}
{{- $s := .Values.signals }}
{{- or $s.rdma.enabled $s.encryption.enabled $s.gpu.enabled $s.nccl.enabled }}
{{- end }}

{{/* What the file of --web.config.file asks for: "https" and "clientCertificates", as YAML. */}}
{{- define "chandra.web" -}}
{{- $web := .Values.web }}
{{- if $web.config }}
{{- $tls := default dict $web.config.tls_server_config }}
https: {{ not (empty $tls) }}
clientCertificates: {{ hasPrefix "Require" (default "" $tls.client_auth_type) }}
users: {{ not (empty $web.config.basic_auth_users) }}
{{- else }}
https: {{ $web.https }}
clientCertificates: {{ $web.clientCertificates }}
users: false
{{- end }}
{{- end }}

{{/* The Secret with that file; empty where there is none. */}}
{{- define "chandra.webSecret" -}}
{{- if .Values.web.config }}
{{- printf "%s-web" (include "chandra.fullname" .) }}
{{- else }}
{{- .Values.web.existingSecret }}
{{- end }}
{{- end }}

{{/* The Secret that names of communicators are made with; empty where there is none. */}}
{{- define "chandra.saltSecret" -}}
{{- $nccl := .Values.signals.nccl }}
{{- if and $nccl.enabled $nccl.salt.existingSecret }}
{{- $nccl.salt.existingSecret }}
{{- else if and $nccl.enabled $nccl.salt.create }}
{{- printf "%s-nccl-salt" (include "chandra.fullname" .) }}
{{- end }}
{{- end }}

{{/* What both containers may not, as YAML. */}}
{{- define "chandra.restricted" -}}
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
# Kubernetes gives added capabilities to root only; tracefs, and the folder of the profiler plugin, are root's.
runAsUser: 0
runAsGroup: 0
runAsNonRoot: false
{{- with .Values.seLinuxOptions }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A generated file with the release's job and its place of runbooks. usage: include "chandra.file" (list . PATH)
Quotes are escaped in JSON, and in strings of YAML that have some. */}}
{{- define "chandra.file" -}}
{{- $values := (first .).Values }}
{{- $text := (first .).Files.Get (last .) }}
{{- range list `"` `\"` }}
{{- $text = $text | replace (printf `job=%schandra%s` . .) (printf `job=%s%s%s` . $values.job .) }}
{{- end }}
{{- with $values.runbookURL }}
{{- $text = $text | replace "runbook_url: docs/runbooks/" (printf "runbook_url: %s" .) }}
{{- $text = regexReplaceAll "(\\w+) \\(`docs/runbooks/([^`]+)`\\)" $text (printf "[${1}](%s${2})" .) }}
{{- end }}
{{- $text }}
{{- end }}

{{/* The flags, as a JSON list. The places of cgroups and of the salt are variables, so that `chandra check` finds them too. */}}
{{- define "chandra.args" -}}
{{- $s := .Values.signals }}
{{- $args := list (printf "--web.listen-address=:%d" (int64 .Values.port)) (printf "--pods=%s" .Values.pods) }}
{{- if include "chandra.webSecret" . }}
{{- $args = append $args "--web.config.file=/etc/chandra/web/web.yaml" }}
{{- end }}
{{- range $name := keys $s | sortAlpha }}
{{- if not (get $s $name).enabled }}
{{- $args = append $args (printf "--disable=%s" $name) }}
{{- end }}
{{- end }}
{{- $args = append $args (printf "--retention=%s" .Values.retention) }}
{{- $args = append $args (printf "--max-owners=%d" (int64 .Values.maxOwners)) }}
{{- if $s.rdma.enabled }}
{{- $args = append $args (printf "--rdma.zero-for=%s" $s.rdma.zeroFor) }}
{{- end }}
{{- if $s.encryption.enabled }}
{{- $args = append $args (printf "--encryption.timed-every=%d" (int64 $s.encryption.timedEvery)) }}
{{- $args = append $args (printf "--encryption.vxlan-port=%d" (int64 $s.encryption.vxlanPort)) }}
{{- $args = append $args (printf "--encryption.geneve-port=%d" (int64 $s.encryption.genevePort)) }}
{{- end }}
{{- range ternary $s.gpu.devices list $s.gpu.enabled }}
{{- $args = append $args (printf "--gpu.device=%s" .) }}
{{- end }}
{{- if and $s.gpu.enabled $s.gpu.cudaCalls.enabled }}
{{- $args = concat $args (list "--cuda-calls" (printf "--cuda-calls.budget=%v" $s.gpu.cudaCalls.budget)) }}
{{- end }}
{{- $args = append $args (printf "--log.level=%s" .Values.logLevel) }}
{{- if .Values.showPaths }}
{{- $args = append $args "--web.show-paths" }}
{{- end }}
{{- $repeatable := list "--disable" "--gpu.device" }}
{{- $own := list }}
{{- range $args }}
{{- $own = append $own (splitList "=" . | first) }}
{{- end }}
{{- range .Values.extraArgs }}
{{- $flag := splitList "=" . | first }}
{{- if and (has $flag $own) (not (has $flag $repeatable)) }}
{{- fail (printf "extraArgs: %s is set by a value of the chart" $flag) }}
{{- end }}
{{- end }}
{{- concat $args (default list .Values.extraArgs) | toJson }}
{{- end }}

{{/* A probe, as YAML. The probes' pages ask for no password. usage: include "chandra.probe" (list . PATH SETTINGS) */}}
{{- define "chandra.probe" -}}
{{- $web := include "chandra.web" (first .) | fromYaml }}
{{- if $web.clientCertificates -}}
tcpSocket:
  port: metrics
{{- else -}}
httpGet:
  path: {{ index . 1 }}
  port: metrics
  scheme: {{ ternary "HTTPS" "HTTP" $web.https }}
{{- end }}
{{- with last . }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Refuses values that contradict each other; the schema refuses those that are wrong by themselves. */}}
{{- define "chandra.validate" -}}
{{- $v := .Values }}
{{- $web := include "chandra.web" . | fromYaml }}
{{- if eq (toString $v.enabled) "false" }}
{{- fail "enabled: it is read by a chart that has this one as a dependency with `condition: chandra.enabled`, and false leaves it out there; here it does nothing" }}
{{- end }}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.apiServer.ports) }}
{{- fail "networkPolicy.apiServer.ports: without any, every port of every address is open: name those of the API server" }}
{{- end }}
{{- range $v.extraVolumes }}
{{- if has .name (list "cgroup" "tracefs" "web" "certificates" "nccl-salt") }}
{{- fail (printf "extraVolumes: %s is a volume of the chart" .name) }}
{{- end }}
{{- end }}
{{- $on := list }}
{{- range $v.signals }}
{{- $on = append $on .enabled }}
{{- end }}
{{- if not (has true $on) }}
{{- fail "signals: all of them are disabled: enable one, or do not install the chart" }}
{{- end }}
{{- if and $v.signals.gpu.cudaCalls.enabled (not $v.signals.gpu.enabled) }}
{{- fail "signals.gpu.cudaCalls.enabled: calls are timed by the signal gpu, which is disabled" }}
{{- end }}
{{- if and $v.web.config $v.web.existingSecret }}
{{- fail "web.config and web.existingSecret: both are set, and there is one file: choose one" }}
{{- end }}
{{- if and (or $v.web.https $v.web.clientCertificates) (not $v.web.existingSecret) }}
{{- fail "web.https and web.clientCertificates: they say what is in web.existingSecret, which is not set; of web.config it is seen" }}
{{- end }}
{{- if and $v.web.clientCertificates (not $v.web.https) }}
{{- fail "web.clientCertificates: there are none without TLS: set web.https too" }}
{{- end }}
{{- if and $v.web.certificateSecret (not $web.https) }}
{{- fail "web.certificateSecret: nothing reads it: name /etc/chandra/tls/tls.crt in the tls_server_config of web.config, or set web.https with web.existingSecret" }}
{{- end }}
{{- if and $v.rbac.create (not $v.serviceAccount.create) (not $v.serviceAccount.name) (eq $v.pods "kube") }}
{{- fail "serviceAccount.name: without it the role would be bound to the namespace's account `default`, which other pods have: name an account, or set rbac.create=false" }}
{{- end }}
{{- if and $v.networkPolicy.enabled $v.hostNetwork }}
{{- fail "networkPolicy.enabled and hostNetwork: pods in the host's network have no policies: choose one" }}
{{- end }}
{{- if $v.podMonitor.enabled }}
{{- if and $web.https (not $v.podMonitor.tlsConfig) }}
{{- fail "podMonitor.tlsConfig: the pods serve HTTPS, and no certificate has their addresses: set serverName and ca, or insecureSkipVerify" }}
{{- end }}
{{- if and $v.podMonitor.tlsConfig (not $web.https) }}
{{- fail "podMonitor.tlsConfig: the pods serve HTTP: set a tls_server_config in web.config, or web.https with web.existingSecret" }}
{{- end }}
{{- if and $web.users (not $v.podMonitor.basicAuth) }}
{{- fail "podMonitor.basicAuth: web.config has users, so Prometheus needs one: set username and password" }}
{{- end }}
{{- end }}
{{- range $v.extraEnv }}
{{- if has .name (list "NODE_NAME" "CHANDRA_PATH_CGROUPFS" "CHANDRA_NCCL_SALT_FILE") }}
{{- fail (printf "extraEnv: %s is set by the chart" .name) }}
{{- end }}
{{- end }}
{{- end }}
