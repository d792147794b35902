// Values for the plain prometheus chart, which has no operator: rules, and how the exporter is scraped.
function(c, rules, alerts) {
  comment: |||
    Values for the plain prometheus chart: Chandra's rules, and the job that scrapes it.
    Helm replaces lists: groups of your own under these two keys are lost if this file comes after them. So have them
    united, and upgrade to the version that is installed:
      chandra-mixin merge --chart prometheus my-values.yaml --out merged.yaml
      helm list -n monitoring                    # CHART says what is installed: prometheus-29.27.0
      helm upgrade prometheus prometheus-community/prometheus -n monitoring --version 29.27.0 -f merged.yaml
    The chart also loads serverFiles.rules and serverFiles.alerts. It does not load what stands in ruleFiles.
  |||,
  values: {
    serverFiles: {
      'recording_rules.yml': { groups: rules },
      'alerting_rules.yml': { groups: alerts },
    },
    // A map by job name: it adds to yours.
    scrapeConfigs: {
      chandra: {
        job_name: 'chandra',
        honor_labels: true,
        kubernetes_sd_configs: [{ role: 'pod' }],
        relabel_configs: [
          { source_labels: ['__meta_kubernetes_pod_container_name'], regex: 'chandra', action: 'keep' },
          { source_labels: ['__meta_kubernetes_pod_container_port_number'], regex: '%d' % c.port, action: 'keep' },
          // A pod that has ended, or was evicted, stays listed with its address.
          { source_labels: ['__meta_kubernetes_pod_phase'], regex: 'Running', action: 'keep' },
          { source_labels: ['__meta_kubernetes_pod_node_name'], target_label: c.nodeLabel },
        ],
      },
    },
  },
}
