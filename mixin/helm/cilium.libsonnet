// Values for the Cilium chart (1.19 and later): the metrics that rules and panels read, found by a Prometheus Operator.
function(c) {
  local monitor = { enabled: true, labels: c.operator.labels },

  comment: |||
    Values for the Cilium chart, 1.19 and later: what Chandra's rules and panels read of Cilium and Hubble.
      helm upgrade cilium cilium/cilium -n kube-system --reuse-values -f cilium.yaml

    Helm replaces lists: a hubble.metrics.enabled of your own is lost if this file comes after it. Have them united:
      chandra-mixin merge --chart cilium --version 1.19 my-values.yaml
    hubble.metrics.dynamic must stay off: the agent does not start with both.
    This chart cannot carry alert rules or Chandra's dashboards: see kube-prometheus-stack.yaml and prometheus.yaml.
    Without a Prometheus Operator set both serviceMonitor.enabled to false; the agent's pods and Hubble's Service are
    annotated for scraping then.
  |||,
  values: {
    prometheus: {
      enabled: true,
      // One flag for all of the chart's monitors: without it `helm template` and GitOps fail, for they do not know the
      // operator's API.
      serviceMonitor: monitor { trustCRDsExist: true },
    },
    dashboards: { enabled: true },
    // Off, hubble_drop_total stays 0.
    bpf: { events: { drop: { enabled: true } } },
    hubble: {
      enabled: true,
      metrics: {
        // In Hubble's metrics `namespace` and `pod` are the agent's: only these contexts tell whose packet it was.
        enabled: [
          'dns:labelsContext=source_namespace,destination_namespace',
          'drop:labelsContext=source_namespace,destination_namespace,traffic_direction',
          'flow',
        ],
        serviceMonitor: monitor,
        dashboards: { enabled: true },
      },
    },
  },
}
