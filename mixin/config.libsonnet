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
    kubeStateMetricsSelector: '',
    cadvisorSelector: '',
    dcgmSelector: '',

    // The labels that a node and a cluster have on every target: Cilium's own ServiceMonitors call the node so, and
    // series without a cluster label are one cluster.
    nodeLabel: 'node',
    clusterLabel: 'cluster',

    // Whether the clusters run Cilium, whose metrics are missed where nobody scrapes them.
    cilium: true,
    // How the values of Hubble's sourceContext and destinationContext are read, where a metric has no labelsContext. Take
    // `namespace` out if yours are workload-name, pod-name or app: a lone word is then no namespace.
    hubbleContexts: ['namespace', 'pod', 'identity'],

    // Namespaces where a dropped packet is an incident, a regular expression that has to match the whole name.
    // A namespace with processes on a GPU is one of them without being named.
    inferenceNamespaces: 'default|(.*-)?(ai|dynamo|inference|kserve|kubeflow|(kube)?ray|llm|ml|models?|nim|serving|sglang|training|triton|vllm)(-.*)?',

    // Namespaces whose communicators are known to pause: a server without requests, a rank that prepares or generates data while
    // the others wait. There a collective that stands still is a ticket after minutes and not a page.
    pausingNamespaces: '(.*-)?(dynamo|inference|kserve|nim|rl|rlhf|serving|sglang|triton|vllm)(-.*)?',

    // Which of `kube_node_status_allocatable` (kube-state-metrics) and `DCGM_FI_DEV_GPU_UTIL` (DCGM's exporter, with the node's
    // label on its targets) tell the nodes that have GPUs, where an exporter has to run. And which resources are GPUs: names
    // as kube-state-metrics writes them.
    gpuNodes: ['kube_node_status_allocatable', 'DCGM_FI_DEV_GPU_UTIL'],
    gpuResources: '(nvidia_com_(gpu|mig_)|amd_com_gpu|gpu_intel_com_|habana_ai_gaudi).*',

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
    grafana: {
      datasource: 'default',
      tags: ['chandra', 'chandra-mixin'],
      from: 'now-1h',
      refresh: '30s',
      // Dashboards of others that "Path of a request" links to, by the names they are published with: DCGM's exporter (12239 on
      // grafana.com) and vLLM's example. Take out those that you do not have.
      others: [
        { title: 'GPUs (DCGM)', uid: 'Oxed_c6Wz' },
        { title: 'vLLM', uid: 'b281712d-8bff-41ef-9f3f-71ad43c05e9b' },
      ],
    },
  },
}
