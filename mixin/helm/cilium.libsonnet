// Values for the Cilium chart (1.19 and later): the metrics that rules and panels read, found by a Prometheus Operator.
function(c) {
  local monitor = { enabled: true, labels: c.operator.labels, interval: '30s' },
  local dashboards = if c.ciliumDashboards then { dashboards: { enabled: true } } else {},

  comment: |||
    Values for the Cilium chart, 1.19 and later: what Chandra's rules and panels read of Cilium and Hubble.
    Helm replaces lists: a hubble.metrics.enabled of your own is lost if this file comes after it. So have it put into
    your values, and upgrade to the version that is installed, not to the newest:
      helm get values cilium -n kube-system -o yaml > my-values.yaml
      chandra-mixin merge --chart cilium --version 1.19 my-values.yaml --out merged.yaml
      helm list -n kube-system                   # CHART says what is installed: cilium-1.19.6
      helm upgrade cilium cilium/cilium -n kube-system --version 1.19.6 -f merged.yaml

    Two traps:
    - An agent reads this when it starts. Until the agents restart they export what they exported before: restart them
      when it suits, `kubectl -n kube-system rollout restart daemonset/cilium` (new connections wait for seconds, node
      by node), or set rollOutCiliumPods.
    - A Prometheus Operator selects monitors by a label, mostly `release: NAME`, the name of its own Helm release. It is
      %s here; with another one nothing is scraped, and nobody says so. Yours:
        kubectl get prometheus -A -o jsonpath='{.items[*].spec.serviceMonitorSelector}'

    hubble.metrics.dynamic must stay off: the agent does not start with both.
    This chart cannot carry alert rules or Chandra's dashboards: see kube-prometheus-stack.yaml and prometheus.yaml.
    Without a Prometheus Operator set both serviceMonitor.enabled to false; the agent's pods and Hubble's Service are
    annotated for scraping then.
  ||| % std.join(', ', ['%s: %s' % [key, c.operator.labels[key]] for key in std.objectFields(c.operator.labels)]),
  values: dashboards {
    prometheus: {
      enabled: true,
      // One flag for all of the chart's monitors: without it `helm template` and GitOps fail, for they do not know the
      // operator's API. The chart's interval is 10 s: at 1 000 nodes 200 scrapes a second. Rules need four in a window.
      serviceMonitor: monitor { trustCRDsExist: true },
    },
    // Off, hubble_drop_total stays 0.
    bpf: { events: { drop: { enabled: true } } },
    hubble: {
      enabled: true,
      metrics: dashboards {
        // In Hubble's metrics `namespace` and `pod` are the agent's: only these contexts tell whose packet it was.
        enabled: [
          'dns:labelsContext=source_namespace,destination_namespace',
          'drop:labelsContext=source_namespace,destination_namespace,traffic_direction',
          'flow:labelsContext=source_namespace,destination_namespace',
          'policy:labelsContext=source_namespace,destination_namespace',
          // A series for each port that a pod has talked to. They go a minute after the pod, which takes both labels.
          'port-distribution:labelsContext=source_namespace,source_pod',
        ],
        serviceMonitor: monitor,
      },
    },
  },
}
