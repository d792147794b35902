// The mixin's public face: `_config`, `prometheusRules`, `prometheusAlerts` and `grafanaDashboards`, as jb, mixtool and
// kube-prometheus expect them. One object per signal, each in the order `_config` → rules → alerts → panels.
local panels = import 'lib/panels.libsonnet';

(import 'config.libsonnet') +
(import 'signals/hubble.libsonnet') +
(import 'signals/tcp.libsonnet') +
(import 'signals/rdma.libsonnet') +
(import 'signals/gpu.libsonnet') +
(import 'signals/nccl.libsonnet') +
(import 'signals/encryption.libsonnet') +
(import 'signals/exporter.libsonnet') +
(import 'signals/path.libsonnet') +
{
  local mixin = self,
  local c = mixin._config,
  local names = std.objectFields(mixin.signals),

  // What every alert has: its duration and severity from `_config.<signal>.<alert>`, and its runbook.
  local finished(signal) = function(alert) {
    local own = c[signal][alert.alert],
    alert: alert.alert,
    expr: alert.expr,
    'for': own['for'],
    labels: { severity: c.severities[own.severity] } + (if 'labels' in alert then alert.labels else {}),
    annotations: {
      summary: alert.summary,
      description: alert.description,
      runbook_url: c.runbookURL % ('%s.md#%s' % [signal, std.asciiLower(alert.alert)]),
    },
  },

  prometheusRules+:: {
    groups+: [{ name: 'chandra-%s.rules' % n, rules: mixin.signals[n].rules } for n in names],
  },

  prometheusAlerts+:: {
    groups+: [
      { name: 'chandra-%s.alerts' % n, rules: std.map(finished(n), mixin.signals[n].alerts) }
      for n in names
      if mixin.signals[n].alerts != []
    ],
  },

  grafanaDashboards+:: {
    // The four panels of the first look, in priority order, and nothing above them.
    'chandra.json': panels.dashboard(
      c,
      'Chandra',
      'chandra',
      'What Hubble, the application and the GPU metrics leave dark, in the order to look at it.',
      [
        mixin.signals.hubble.first { w: 12, h: 11 },
        mixin.signals.tcp.first { w: 12, h: 11 },
        mixin.signals.rdma.first { w: 12, h: 11 },
        mixin.signals.encryption.first { w: 12, h: 11 },
      ],
    ),
  } + {
    ['chandra-%s.json' % n]: panels.dashboard(
      c,
      'Chandra / ' + mixin.signals[n].title,
      'chandra-' + n,
      mixin.signals[n].question,
      mixin.signals[n].panels,
      if 'others' in mixin.signals[n] then mixin.signals[n].others else [],
    )
    for n in names
  },
}
