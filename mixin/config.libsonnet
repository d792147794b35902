// What an operator may change. Thresholds stand with their reason in signals/<s>.libsonnet, under the alert's name.
{
  _config+:: {
    // Which series are read. Metrics of others are known by their names alone, so those selectors are empty.
    selector: 'job="chandra"',
    hubbleSelector: '',
    ciliumSelector: '',
    nodeExporterSelector: '',
    vllmSelector: '',
    httpSelector: '',

    // The labels that a node and a cluster have on every target: Cilium's own ServiceMonitors call the node so, and
    // series without a cluster label are one cluster.
    nodeLabel: 'node',
    clusterLabel: 'cluster',

    // Namespaces where a dropped packet is an incident, a regular expression that has to match the whole name.
    inferenceNamespaces: '(.*-)?(ai|inference|llm|ml|models?|serving|training|vllm)(-.*)?',

    // Over what a rate is taken: at least four scrapes. The names of the recording rules end in it.
    window: '5m',

    // Who acts, and when: the on-call now; the owning team on the next working day; nobody, it explains other alerts.
    severities: { page: 'critical', ticket: 'warning', note: 'info' },

    // `%s` is `<signal>.md#<alert>`. A path in the project's tree until you serve docs/runbooks/ somewhere: `https://…/%s`.
    runbookURL: 'docs/runbooks/%s',

    // The labels by which a Prometheus Operator finds rules and monitors, and in which namespace they go.
    operator: { labels: { release: 'kube-prometheus-stack' }, namespace: 'monitoring' },

    // Cilium's own dashboards, which its chart brings along: Chandra's do not need them.
    ciliumDashboards: false,

    // The exporter's image, which a sidecar of the Cilium agent requires: none is published (`make image` builds it).
    image: '',
    // Its port, for the sidecar and for the plain Prometheus chart.
    port: 9970,
    // Signals that cannot work in a sidecar, which has no hostPID.
    sidecarDisable: ['gpu', 'nccl'],

    // Dashboards: the datasource variable's first choice, tags, how old the view is and how often it is renewed.
    grafana: { datasource: 'default', tags: ['chandra', 'chandra-mixin'], from: 'now-1h', refresh: '30s' },
  },
}
