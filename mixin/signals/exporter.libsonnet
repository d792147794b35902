// The exporter itself: is it there, does it see everything, does it know whose it is?
local panels = import '../lib/panels.libsonnet';
local text = import '../lib/text.libsonnet';

{
  _config+:: {
    exporter: {
      ChandraDown: { 'for': '5m', severity: 'ticket' },
      // Nodes with GPUs on which no exporter is a target. A new node is given time to be set up.
      ChandraNotOnGpuNode: { 'for': '30m', severity: 'ticket' },
      // A signal that should work on this host and does not; one that the host does not have is `absent`, no alert.
      ChandraSignalDown: { 'for': '5m', severity: 'ticket' },
      // Share of events that a signal saw and could not count. A scrape that could not read the maps (read_failed) is
      // no event: the next one finds them there, and a signal that cannot be read at all is ChandraSignalDown.
      // `floor`: events a second below which a share means nothing; this is thirty in five minutes.
      ChandraEventsLost: { threshold: 0.01, floor: 0.1, 'for': '10m', severity: 'ticket' },
      // Share of units that a signal counted for nobody. Some are: the first seconds of a pod, a socket of a pod that
      // has gone. `floor`: as above, in units.
      ChandraAttributionPoor: { threshold: 0.1, floor: 0.1, 'for': '30m', severity: 'ticket' },
      // Seconds since the source of pod names last answered: pods that came since have no name.
      ChandraPodsStale: { threshold: 600, 'for': '5m', severity: 'ticket' },
      // Series of one node. The design's limit for a node with 8 GPU pods.
      ChandraSeriesBudgetReached: { threshold: 2500, 'for': '15m', severity: 'note' },
    },
  },

  signals+:: {
    exporter: {
      local c = $._config,
      local x = c.exporter,
      local f = { w: c.window, cluster: c.clusterLabel, node: c.nodeLabel, sel: c.selector },

      // What tells that a node has GPUs. kube-state-metrics has the node's name in a label of its own; DCGM's exporter is
      // a target whose node its monitor names.
      local gpuNodes = {
        kube_node_status_allocatable:
          local named = 'kube_node_status_allocatable{resource=~"%s", %s}' % [c.gpuResources, c.kubeStateMetricsSelector];
          local own = if c.nodeLabel == 'node' then named else 'label_replace(%s, "%s", "$1", "node", "(.*)")' % [named, c.nodeLabel];
          // Where the target's label has taken its place.
          'sum by (%(cluster)s, %(node)s) (max by (%(cluster)s, %(node)s, resource) (label_replace(%%s, "%(node)s", "$1", "exported_node", "(.+)")))' % f % own,
        DCGM_FI_DEV_GPU_UTIL: 'count by (%(cluster)s, %(node)s) (DCGM_FI_DEV_GPU_UTIL{%(node)s!="", %(dcgm)s})' % (f { dcgm: c.dcgmSelector }),
      },

      title: 'Exporter',
      question: 'Does Chandra itself work?',

      rules: [
        {
          record: 'signal:chandra_attribution:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, signal) (rate(chandra_attribution_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'signal:chandra_lost_events:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, signal) (rate(chandra_lost_events_total{reason!="read_failed", %(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'signal:chandra_lost_events:ratio_rate%(w)s' % f,
          expr: |||
            signal:chandra_lost_events:rate%(w)s
            /
            (signal:chandra_lost_events:rate%(w)s + signal:chandra_attribution:rate%(w)s)
          ||| % f,
        },
        {
          record: 'signal:chandra_attribution_unknown:ratio_rate%(w)s' % f,
          expr: |||
            sum by (%(cluster)s, %(node)s, signal) (rate(chandra_attribution_total{result="unknown", %(sel)s}[%(w)s]))
            /
            signal:chandra_attribution:rate%(w)s
          ||| % f,
        },
        {
          record: 'node:chandra_series:sum',
          expr: 'sum by (%(cluster)s, %(node)s) (chandra_series{%(sel)s})' % f,
        },
        {
          record: 'program:chandra_program_run_seconds:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, signal, program) (rate(chandra_program_run_seconds_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'program:chandra_program_runs:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, signal, program) (rate(chandra_program_runs_total{%(sel)s}[%(w)s]))' % f,
        },
      ],

      alerts: [
        {
          alert: 'ChandraDown',
          expr: 'up{%(sel)s} == 0 or absent(up{%(sel)s})' % f,
          // What absent() gives has no instance.
          summary: '{{ if $labels.instance }}Chandra is down on ' + text.node(c) + '{{ else }}Chandra is nowhere to be scraped{{ end }}.',
          description: '{{ with $labels.instance }}Prometheus cannot scrape Chandra on ' + text.node(c) + ' ({{ . }}): none of its signals is seen there.' +
                       '{{ else }}Prometheus has no target for Chandra: none of its signals is seen on any node.{{ end }}',
        },
      ] + (if c.gpuNodes == [] then [] else [
        {
          alert: 'ChandraNotOnGpuNode',
          expr: |||
            (
              %(nodes)s
            )
            unless on (%(cluster)s, %(node)s)
            up{%(sel)s}
          ||| % (f { nodes: std.join('\n  or\n  ', [gpuNodes[source] + ' > 0' for source in c.gpuNodes]) }),
          summary: 'Chandra does not run on ' + text.node(c) + ', which has GPUs.',
          description: text.node(c, 'Node', 'An unnamed node') + ' has {{ $value }} GPUs, and no exporter there is a target of Prometheus: none of its signals is seen. A taint that the DaemonSet does not tolerate, a node selector, or a missing monitor.',
        },
      ]) + [
        {
          alert: 'ChandraSignalDown',
          expr: 'max by (%(cluster)s, %(node)s, signal) (chandra_signal_state{state="failed", %(sel)s}) == 1' % f,
          summary: 'Signal {{ $labels.signal }} of Chandra does not work on ' + text.node(c) + '.',
          description: 'Signal {{ $labels.signal }} should work on ' + text.node(c) + ' and does not. Missing hooks by reason: ' +
                       // None, where all are attached and reading the maps fails.
                       text.list(c, 'count by (reason) (chandra_hook_info{%%s,reason!="attached",%(sel)s})' % f, ['cluster', 'node', 'signal'], '{{ $row.Labels.reason }} {{ $row.Value }}', none='none') + '. The page / of the exporter says why, and what to do.',
        },
        {
          alert: 'ChandraEventsLost',
          expr: |||
            signal:chandra_lost_events:ratio_rate%(w)s > %(threshold)g
            and
            signal:chandra_lost_events:rate%(w)s + signal:chandra_attribution:rate%(w)s > %(floor)g
          ||| % (f + x.ChandraEventsLost),
          summary: 'Signal {{ $labels.signal }} of Chandra loses events on ' + text.node(c) + '.',
          description: 'Signal {{ $labels.signal }} on ' + text.node(c) + ' loses {{ $value | humanizePercentage }} of its events, so its figures are too low; by reason: ' +
                       text.list(c, 'sum by (reason) (rate(chandra_lost_events_total{%%s,reason!="read_failed",%(sel)s}[%(w)s])) > 0' % f, ['cluster', 'node', 'signal'], '{{ $row.Labels.reason }} ' + text.number('$row.Value') + '/s') + '.',
        },
        {
          alert: 'ChandraAttributionPoor',
          expr: |||
            signal:chandra_attribution_unknown:ratio_rate%(w)s > %(threshold)g
            and
            signal:chandra_attribution:rate%(w)s > %(floor)g
          ||| % (f + x.ChandraAttributionPoor),
          summary: 'Signal {{ $labels.signal }} of Chandra does not know whose events it counts on ' + text.node(c) + '.',
          description: 'Signal {{ $labels.signal }} on ' + text.node(c) + ' counts {{ $value | humanizePercentage }} of its events for pod="unknown": it cannot tell whose they are.',
        },
        {
          alert: 'ChandraPodsStale',
          expr: 'max by (%(cluster)s, %(node)s) (chandra_pods_age_seconds{%(sel)s}) > %(threshold)g' % (f + x.ChandraPodsStale),
          summary: 'Chandra does not hear of new pods on ' + text.node(c) + '.',
          description: 'The source of pod names on ' + text.node(c) + ' has not answered for {{ $value | humanizeDuration }}: pods that came since have no name in any metric.',
        },
        {
          alert: 'ChandraSeriesBudgetReached',
          expr: 'node:chandra_series:sum > %(threshold)g' % (f + x.ChandraSeriesBudgetReached),
          summary: 'Chandra on ' + text.node(c) + ' exports more series than planned.',
          description: 'Chandra on ' + text.node(c) + ' exports {{ $value }} series; by signal: ' +
                       text.list(c, 'chandra_series{%%s,%(sel)s}' % f, ['cluster', 'node'], '{{ $row.Labels.signal }} {{ $row.Value }}') + '.',
        },
      ],

      local where = panels.where(c, ['cluster', 'node']),
      local p = f { where: where },

      panels: [
        panels.stat(
          'Exporters',
          'Exporters that answer, and those that do not.',
          [
            { expr: 'sum(up{%(sel)s, %(where)s})' % p, legend: 'up' },
            { expr: 'count(up{%(sel)s, %(where)s} == 0) or vector(0)' % p, legend: 'down' },
          ],
          'short',
        ) + panels.thresholdsOf('B', 'short', [panels.above(1)]),
        panels.stat(
          'Signals that do not work',
          'Nodes on which a signal should work and does not. The page / of the exporter says why, and what to do.',
          [{ expr: 'sum by (signal) (chandra_signal_state{state="failed", %(sel)s, %(where)s})' % p, legend: '{{signal}}' }],
          'short',
          [panels.above(1)],
        ),
        panels.table(
          'Hooks that are missing',
          'What could not be attached, and why. Absent modules and kernels without a function are no fault.',
          'count by (signal, hook, reason) (chandra_hook_info{reason!="attached", %(sel)s, %(where)s})' % p,
          'short',
          ['signal', 'hook', 'reason'],
          'nodes',
        ),
        panels.timeseries(
          'Events lost',
          'Share of events that a signal saw and could not count. Above the line ChandraEventsLost fires.',
          [{ expr: 'topk(20, signal:chandra_lost_events:ratio_rate%(w)s{%(where)s})' % p, legend: '{{%(node)s}} {{signal}}' % f }],
          'percentunit',
          [panels.above(x.ChandraEventsLost.threshold)],
        ),
        panels.timeseries(
          'Events of nobody',
          'Share of events counted for pod="unknown". Above the line ChandraAttributionPoor fires.',
          [{ expr: 'topk(20, signal:chandra_attribution_unknown:ratio_rate%(w)s{%(where)s})' % p, legend: '{{%(node)s}} {{signal}}' % f }],
          'percentunit',
          [panels.above(x.ChandraAttributionPoor.threshold)],
        ),
        panels.timeseries(
          'Series per node',
          'What a node costs Prometheus. Above the line ChandraSeriesBudgetReached fires; --max-owners bounds it.',
          [{ expr: 'topk(20, node:chandra_series:sum{%(where)s})' % p, legend: '{{%(node)s}}' % f }],
          'short',
          [panels.above(x.ChandraSeriesBudgetReached.threshold, 'orange')],
        ),
        panels.timeseries(
          'Time of a scrape',
          'Reading the maps and rendering, by signal.',
          [{ expr: 'max by (signal) (chandra_scrape_seconds{%(sel)s, %(where)s})' % p, legend: '{{signal}}' }],
          's',
        ),
        panels.timeseries(
          'CPU of the programs',
          'CPU cores, where the host keeps bpf statistics (kernel.bpf_stats_enabled=1).',
          [{ expr: 'topk(20, program:chandra_program_run_seconds:rate%(w)s{%(where)s})' % p, legend: '{{%(node)s}} {{program}}' % f }],
          panels.cores,
        ),
        panels.timeseries(
          'Cost of one event',
          'Seconds for one run of a program, where the host keeps bpf statistics.',
          [{ expr: 'topk(20, program:chandra_program_run_seconds:rate%(w)s{%(where)s} / (program:chandra_program_runs:rate%(w)s{%(where)s} > 0))' % p, legend: '{{%(node)s}} {{program}}' % f }],
          's',
        ),
        panels.timeseries(
          'Age of pod names',
          'Seconds since the source of pod names last answered. Above the line ChandraPodsStale fires.',
          [{ expr: 'topk(20, chandra_pods_age_seconds{%(sel)s, %(where)s})' % p, legend: '{{%(node)s}}' % f }],
          's',
          [panels.above(x.ChandraPodsStale.threshold)],
        ),
      ],
    },
  },
}
