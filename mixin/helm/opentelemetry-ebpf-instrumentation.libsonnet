// Values for the opentelemetry-ebpf-instrumentation chart (0.12 and later): how long HTTP requests take, by pod.
function(c) {
  comment: |||
    Values for the opentelemetry-ebpf-instrumentation chart, 0.12 and later: how long HTTP servers take for a request, by pod,
    for the first rows of the dashboard "Path of a request". For inference gateways, and for servers that have no
    metrics of their own; vLLM has.
      helm install obi open-telemetry/opentelemetry-ebpf-instrumentation -n monitoring -f opentelemetry-ebpf-instrumentation.yaml

    It runs privileged on every node and looks at every process there, unless config.data.discovery says which; for example
      discovery: { instrument: [{ k8s_namespace: 'inference*' }] }
    By the chart's defaults it sends traces and metrics to a collector on its node too. Here it does not: take out the two
    lines with null if you have one.
    Without a Prometheus Operator set serviceMonitor.enabled to false, and scrape the Service's port `metrics`.
  |||,
  values: {
    preset: 'application',
    service: { enabled: true },
    serviceMonitor: { enabled: true, additionalLabels: c.operator.labels },
    config: {
      data: {
        otel_traces_export: null,
        otel_metrics_export: null,
        prometheus_export: { port: 9090, path: '/metrics' },
        attributes: {
          kubernetes: { enable: true },
          // The names of the pod are all that is read. By default each client's and server's address, route, method and
          // status is a series of each bucket.
          select: { 'http.server.request.duration': { include: ['k8s.namespace.name', 'k8s.pod.name'] } },
        },
      },
    },
  },
}
