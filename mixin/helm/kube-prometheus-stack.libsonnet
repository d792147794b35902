// Values for the kube-prometheus-stack chart: rules and dashboards.
function(c, signals, dashboards) {
  comment: |||
    Values for the kube-prometheus-stack chart: Chandra's rules and dashboards. Maps only, so it adds to your values
    whatever their order. Upgrade to the version that is installed:
      helm list -n monitoring                    # CHART says what is installed: kube-prometheus-stack-88.5.3
      helm upgrade kube-prometheus-stack prometheus-community/kube-prometheus-stack -n monitoring --version 88.5.3 -f my-values.yaml -f kube-prometheus-stack.yaml
    The chart ignores the deprecated list additionalPrometheusRules as soon as this map is set. If you have one:
      chandra-mixin merge --chart kube-prometheus-stack my-values.yaml
    takes over what stands in it.
  |||,
  values: {
    additionalPrometheusRulesMap: { ['chandra-' + s]: { '$ref': 'alerts/%s.yaml' % s } for s in signals },
    grafana: {
      dashboardProviders: {
        // A file of its own, beside the user's dashboardproviders.yaml.
        'chandra.yaml': {
          apiVersion: 1,
          providers: [{
            name: 'chandra',
            orgId: 1,
            folder: 'Chandra',
            type: 'file',
            disableDeletion: false,
            editable: true,
            options: { path: '/var/lib/grafana/dashboards/chandra' },
          }],
        },
      },
      dashboards: {
        chandra: { [std.strReplace(name, '.json', '')]: { json: { '$text': 'dashboards/' + name } } for name in dashboards },
      },
    },
  },
}
