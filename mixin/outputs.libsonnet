// Everything that is rendered, as one tree: path → { json } or { yaml, comment }, and what is wrong with the overrides.
// `overrides` is added to the mixin. In a YAML value, { '$ref': path } stands for the value of another file, and
// { '$text': path } for its text: jsonnet would evaluate it again for each place.
function(overrides={}) {
  local defaults = import 'mixin.libsonnet',
  local mixin = defaults + overrides,
  local c = mixin._config,
  local names = std.objectFields(mixin.signals),

  // Paths of what `new` has and `old` has not, or has in another type.
  local differences(old, new, path) =
    std.flattenArrays([
      local at = path + '.' + key;
      if !std.objectHas(old, key) then [{ path: at, problem: 'unknown key' }]
      else if std.type(old[key]) != std.type(new[key]) then [{ path: at, problem: 'is of type %s, not %s' % [std.type(new[key]), std.type(old[key])] }]
      else if std.isObject(old[key]) && !std.member(open, at) then differences(old[key], new[key], at)
      else []
      for key in std.objectFields(new)
    ]),
  // Maps of the user's own keys.
  local open = ['_config.operator.labels', '_config.severities'],
  local faces = ['_config', 'signals', 'prometheusRules', 'prometheusAlerts', 'grafanaDashboards'],

  problems:
    (if std.isObject(overrides) then [
       { path: key, problem: 'unknown key (overrides have _config, and perhaps %s)' % std.join(', ', faces[1:]) }
       for key in std.objectFieldsAll(overrides)
       if !std.member(faces, key)
     ] + differences(defaults._config, c, '_config')
     else [{ path: '', problem: 'overrides are an object, not of type %s' % std.type(overrides) }]),

  local of(groups, s) = [g for g in groups if std.startsWith(g.name, 'chandra-%s.' % s)],
  local groups = { [s]: of(mixin.prometheusRules.groups, s) + of(mixin.prometheusAlerts.groups, s) for s in names },
  local dashboards = mixin.grafanaDashboards,
  local metadata(name) = { name: name, namespace: c.operator.namespace, labels: c.operator.labels { 'app.kubernetes.io/name': 'chandra' } },
  local chart(rendered) = { comment: rendered.comment, yaml: rendered.values },

  files:
    { ['alerts/%s.yaml' % s]: { yaml: { groups: groups[s] } } for s in names } +
    { ['dashboards/' + name]: { json: dashboards[name] } for name in std.objectFields(dashboards) } +
    {
      ['manifests/prometheusrule-%s.yaml' % s]: {
        comment: 'For a Prometheus Operator without Helm: kubectl apply -f',
        yaml: {
          apiVersion: 'monitoring.coreos.com/v1',
          kind: 'PrometheusRule',
          metadata: metadata('chandra-' + s),
          spec: { '$ref': 'alerts/%s.yaml' % s },
        },
      }
      for s in names
    } +
    {
      'helm-values/cilium.yaml': chart((import 'helm/cilium.libsonnet')(c)),
      'helm-values/cilium-sidecar.yaml': chart((import 'helm/cilium-sidecar.libsonnet')(c)),
      'helm-values/kube-prometheus-stack.yaml': chart((import 'helm/kube-prometheus-stack.libsonnet')(c, names, std.objectFields(dashboards))),
      'helm-values/opentelemetry-ebpf-instrumentation.yaml': chart((import 'helm/opentelemetry-ebpf-instrumentation.libsonnet')(c)),
      'helm-values/prometheus.yaml': chart((import 'helm/prometheus.libsonnet')(c, mixin.prometheusRules.groups, mixin.prometheusAlerts.groups)),
      'manifests/podmonitor-cilium-sidecar.yaml': {
        comment: 'Scrapes the exporter that runs beside the Cilium agent (helm-values/cilium-sidecar.yaml).',
        yaml: {
          apiVersion: 'monitoring.coreos.com/v1',
          kind: 'PodMonitor',
          metadata: metadata('chandra-cilium-sidecar'),
          spec: {
            namespaceSelector: { matchNames: ['kube-system'] },
            selector: { matchLabels: { 'k8s-app': 'cilium' } },
            podMetricsEndpoints: [{
              port: 'chandra',
              // The pod labels of Chandra's series are those of the pod that they are about.
              honorLabels: true,
              relabelings: [
                { sourceLabels: ['__meta_kubernetes_pod_node_name'], targetLabel: c.nodeLabel },
                { targetLabel: 'job', replacement: 'chandra' },
              ],
            }],
          },
        },
      },
    },
}
