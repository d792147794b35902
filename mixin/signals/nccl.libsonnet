// NCCL: is the job slow because of the network, or because one rank comes late, and which?
local panels = import '../lib/panels.libsonnet';
local rates = import '../lib/rates.libsonnet';
local text = import '../lib/text.libsonnet';

{
  _config+:: {
    nccl: {
      // Seconds that the ranks wait for the last one in each collective, on average: below a millisecond even a
      // straggler costs little. Said of a rank only if it is the last in more than `lastArrivals` of the collectives,
      // three in four: chance makes each of N ranks the last in 1/N.
      NcclStraggler: { threshold: 0.001, lastArrivals: 0.75, 'for': '5m', severity: 'ticket' },
      // Seconds that the others wait for a rank of another node in each collective, on average, as the profiler plugin tells
      // them. `share`: of what a collective takes on average; less is the shape of a ring.
      NcclStragglerAcrossNodes: { threshold: 0.001, share: 0.1, 'for': '5m', severity: 'ticket' },
      // How far back a communicator's pace counts, and how long a pause is remembered.
      paceWindow: '1h',
      pauseWindow: '6h',
      // Seconds that a collective is under way in a communicator that made more than `pace` a second over `window`. A step takes
      // seconds. One that has paused before, for a checkpoint, and went on: `pauses` times as long as then.
      NcclCollectiveStuck: { threshold: 30, pace: 1, pauses: 3, 'for': '20s', severity: 'page' },
      // The same of any other: slow by nature, or known to pause. PyTorch's watchdog ends a job after ten minutes.
      NcclCollectiveWaits: { threshold: 300, 'for': '1m', severity: 'ticket' },
      // Seconds until a communicator is there, in nine of ten cases of the last `window`. Thousands of ranks take half
      // a minute. A quantile within a bucket is a guess and buckets grow by four, so this is the bound of one (16, 64,
      // 256 s): below, ranks that take 17 s could count as slow.
      NcclInitSlow: { threshold: 64, window: '15m', 'for': '1m', severity: 'ticket' },
    },
  },

  signals+:: {
    nccl: {
      local c = $._config,
      local n = c.nccl,
      local f = { step: rates.step(c), pace: n.paceWindow, pause: n.pauseWindow, pausing: c.pausingNamespaces, w: c.window, cluster: c.clusterLabel, node: c.nodeLabel, sel: c.selector, init: n.NcclInitSlow.window },
      local quantile(q, metric, labels) = |||
        histogram_quantile(%(q)g, sum by (%(cluster)s, %(node)s, namespace, pod, %(labels)sle) (rate(%(metric)s_bucket{%(sel)s}[%(w)s])))
      ||| % (f { q: q, metric: metric, labels: std.join('', [label + ', ' for label in labels]) }),
      // Both tiers, host and kernel (the profiler plugin), may tell the same rank. They are kept apart: who is the last on
      // the host, if only by microseconds, is not who the GPUs wait for.
      local rank(metric) = 'sum by (%(cluster)s, %(node)s, namespace, pod, communicator, rank, source) (rate(%(metric)s{communicator!="other", %(sel)s}[%(w)s]))' % (f { metric: metric }),

      title: 'NCCL',
      question: 'Is the job slow because of the network, or because one rank comes late, and which?',

      rules: [
        { record: 'rank:chandra_nccl_collectives:rate%(w)s' % f, expr: rank('chandra_nccl_rank_collectives_total') },
        { record: 'rank:chandra_nccl_wait_seconds:rate%(w)s' % f, expr: rank('chandra_nccl_rank_wait_seconds_total') },
        { record: 'rank:chandra_nccl_last_arrivals:rate%(w)s' % f, expr: rank('chandra_nccl_rank_last_arrivals_total') },
        {
          record: 'rank:chandra_nccl_last_arrivals:ratio_rate%(w)s' % f,
          expr: 'rank:chandra_nccl_last_arrivals:rate%(w)s / rank:chandra_nccl_collectives:rate%(w)s' % f,
        },
        {
          // What the ranks of a node wait in one collective, on average over collectives and ranks.
          record: 'communicator:chandra_nccl_wait_seconds:mean%(w)s' % f,
          expr: |||
            sum by (%(cluster)s, %(node)s, namespace, communicator, source) (rank:chandra_nccl_wait_seconds:rate%(w)s)
            /
            sum by (%(cluster)s, %(node)s, namespace, communicator, source) (rank:chandra_nccl_collectives:rate%(w)s)
          ||| % f,
        },
        {
          // What is judged: what the GPUs wait where the plugin tells of all ranks of a communicator on the node, what the
          // host's calls wait elsewhere. A rank may call last and its GPU be the first.
          record: 'communicator:chandra_nccl_judged_wait_seconds:mean%(w)s' % f,
          expr: |||
            communicator:chandra_nccl_wait_seconds:mean%(w)s
            unless
            label_replace(
              count by (%(cluster)s, %(node)s, namespace, communicator) (rank:chandra_nccl_collectives:rate%(w)s{source="kernel"} > 0)
              >=
              count by (%(cluster)s, %(node)s, namespace, communicator) (rank:chandra_nccl_collectives:rate%(w)s{source="host"} > 0),
              "source", "host", "", ""
            )
          ||| % f,
        },
        {
          // The straggler's share in the communicators that wait for it. Once for the rank: a job has several communicators.
          record: 'rank:chandra_nccl_straggler:ratio_rate%(w)s' % f,
          expr: |||
            max without (communicator, source) (
              rank:chandra_nccl_last_arrivals:ratio_rate%(w)s > %(lastArrivals)g
              and on (%(cluster)s, %(node)s, namespace, communicator, source)
              communicator:chandra_nccl_judged_wait_seconds:mean%(w)s > %(threshold)g
            )
          ||| % (f + n.NcclStraggler),
        },
        {
          // How long a collective takes on the GPU of a rank, on average. Each node tells its own: no clock is compared.
          record: 'rank:chandra_nccl_collective_seconds:mean%(w)s' % f,
          expr: |||
            sum by (%(cluster)s, %(node)s, namespace, pod, communicator, rank) (rate(chandra_nccl_rank_collective_seconds_total{communicator!="other", %(sel)s}[%(w)s]))
            /
            (sum by (%(cluster)s, %(node)s, namespace, pod, communicator, rank) (rank:chandra_nccl_collectives:rate%(w)s{source="kernel"}) > 0)
          ||| % f,
        },
        {
          // All ranks end together, so the one that takes the shortest came last: how much less than the others, on average, is
          // what they wait for it. The average is of all N ranks, so N-1 others have N/(N-1) of the difference. On all nodes,
          // and of nodes and ranks without the plugin nothing. A rank that is the last only at times is not told from the
          // network: turns cancel out.
          record: 'rank:chandra_nccl_waited_for_seconds:mean%(w)s' % f,
          expr: |||
            (
              avg by (%(cluster)s, namespace, communicator) (rank:chandra_nccl_collective_seconds:mean%(w)s)
              - on (%(cluster)s, namespace, communicator) group_right ()
              rank:chandra_nccl_collective_seconds:mean%(w)s
            )
            / on (%(cluster)s, namespace, communicator) group_left ()
            (1 - 1 / count by (%(cluster)s, namespace, communicator) (rank:chandra_nccl_collective_seconds:mean%(w)s))
          ||| % f,
        },
        {
          record: 'pod:chandra_nccl_oldest_pending_seconds:max',
          expr: 'max by (%(cluster)s, %(node)s, namespace, pod) (chandra_nccl_oldest_pending_seconds{%(sel)s})' % f,
        },
        {
          record: 'communicator:chandra_nccl_collectives:rate%(w)s' % f,
          expr: 'max by (%(cluster)s, %(node)s, namespace, communicator) (rank:chandra_nccl_collectives:rate%(w)s)' % f,
        },
        {
          record: 'pod_communicator:chandra_nccl_pending_seconds:max',
          expr: 'max by (%(cluster)s, %(node)s, namespace, pod, communicator) (chandra_nccl_communicator_pending_seconds{%(sel)s})' % f,
        },
        {
          // How long a pod stood still before it went on. One that ends instead has not paused.
          record: 'pod:chandra_nccl_pause_seconds:max%(step)s' % f,
          expr: |||
            max_over_time(pod:chandra_nccl_oldest_pending_seconds:max[%(step)s]) > %(threshold)g
            and
            pod:chandra_nccl_oldest_pending_seconds:max < %(threshold)g
          ||| % (f + n.NcclCollectiveStuck),
        },
        {
          record: 'pod:chandra_nccl_stuck_seconds:max',
          expr: |||
            max by (%(cluster)s, %(node)s, namespace, pod) (
              pod_communicator:chandra_nccl_pending_seconds:max{namespace!~"%(pausing)s"} > %(threshold)g
              and on (%(cluster)s, %(node)s, namespace, communicator)
              max_over_time(communicator:chandra_nccl_collectives:rate%(w)s[%(pace)s]) > %(fast)g
              unless
              pod_communicator:chandra_nccl_pending_seconds:max
              <= on (%(cluster)s, %(node)s, namespace, pod) group_left ()
              (max_over_time(pod:chandra_nccl_pause_seconds:max%(step)s[%(pause)s]) * %(pauses)g)
            )
          ||| % (f { threshold: n.NcclCollectiveStuck.threshold, fast: n.NcclCollectiveStuck.pace, pauses: n.NcclCollectiveStuck.pauses }),
        },
        {
          // A rank initialises once: its series may appear with the value of its first initialisation.
          record: 'pod_phase:chandra_nccl_init_seconds:p90_increase%(init)s' % f,
          expr: 'histogram_quantile(0.9, sum by (%(cluster)s, %(node)s, namespace, pod, phase, le) (%%s))' % f
                % rates.increase(c, 'chandra_nccl_init_seconds_bucket', ['namespace', 'pod', 'container', 'phase', 'le'], n.NcclInitSlow.window),
        },
        { record: 'pod_operation_source:chandra_nccl_arrival_wait_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_nccl_arrival_wait_seconds', ['operation', 'source']) },
        { record: 'pod_operation:chandra_nccl_collective_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_nccl_collective_seconds', ['operation']) },
        { record: 'pod_operation:chandra_nccl_enqueue_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_nccl_enqueue_seconds', ['operation']) },
      ],

      // What is waited in the communicators that the rank holds up.
      local waits = 'max by (communicator) ((rank:chandra_nccl_last_arrivals:ratio_rate%(w)s{%%s} > bool %(lastArrivals)g)' +
                    ' * on (%(cluster)s, %(node)s, namespace, communicator, source) group_left ()' +
                    ' communicator:chandra_nccl_judged_wait_seconds:mean%(w)s) > %(threshold)g',
      local waitedFor = 'rank:chandra_nccl_waited_for_seconds:mean%(w)s' % f,

      local missing =
        'Missing: ' +
        text.list(c, 'topk(8, max by (namespace, pod, rank, state) (chandra_nccl_missing_rank_seconds{%%s,%(sel)s}))' % f, ['cluster', 'node', 'namespace'], text.podItem('rank {{ $row.Labels.rank }} ({{ $row.Labels.state }})'), none='not on this node') + '.',

      alerts: [
        {
          alert: 'NcclStraggler',
          expr: 'rank:chandra_nccl_straggler:ratio_rate%(w)s' % f,
          summary: text.pod(c) + ': rank {{ $labels.rank }} holds up its NCCL job.',
          description: text.pod(c) + ': rank {{ $labels.rank }} is the last in {{ $value | humanizePercentage }} of the collectives. Average wait of the ranks on this node, per collective: ' +
                       text.list(c, waits % (f + n.NcclStraggler), ['cluster', 'node', 'namespace', 'pod', 'rank'], '{{ $row.Value | humanizeDuration }} in communicator {{ $row.Labels.communicator }}') +
                       ". Look at the late rank's GPU, CPU and data loader before the network.",
        },
        {
          alert: 'NcclStragglerAcrossNodes',
          // Communicators of several nodes, and one alert for all late ranks of a pod. A rank that is late among those of its
          // own node is told by NcclStraggler.
          expr: |||
            max by (%(cluster)s, %(node)s, namespace, pod) (
              %(waited)s > %(threshold)g
              and on (%(cluster)s, namespace, communicator)
              count by (%(cluster)s, namespace, communicator) (group by (%(cluster)s, %(node)s, namespace, communicator) (%(waited)s)) != 1
              and on (%(cluster)s, %(node)s, namespace, pod, communicator, rank)
              %(waited)s / on (%(cluster)s, namespace, communicator) group_left ()
              avg by (%(cluster)s, namespace, communicator) (rank:chandra_nccl_collective_seconds:mean%(w)s) > %(share)g
            )
            unless on (%(cluster)s, %(node)s, namespace, pod)
            rank:chandra_nccl_straggler:ratio_rate%(w)s
          ||| % (f + n.NcclStragglerAcrossNodes { waited: waitedFor }),
          summary: text.pod(c) + ' holds up its NCCL job across nodes.',
          description: text.pod(c) + ': ranks of other nodes wait {{ $value | humanizeDuration }} for it in each collective, on average. Waited for, by rank: ' +
                       text.list(c, 'topk(5, max by (%(node)s, pod, rank) (rank:chandra_nccl_waited_for_seconds:mean%(w)s{%%s})) > 0' % f, ['cluster', 'namespace'], '{{ $row.Labels.pod }} rank {{ $row.Labels.rank }} {{ $row.Value | humanizeDuration }}') +
                       ". Look at the late rank's GPU, CPU and data loader before the network.",
        },
        {
          alert: 'NcclCollectiveStuck',
          expr: 'pod:chandra_nccl_stuck_seconds:max',
          summary: text.pod(c) + ': a NCCL collective hangs.',
          // Who waits is known when the last one has come: of the collective that hangs, nobody's wait is counted yet.
          description: text.pod(c) + ': a NCCL collective has been under way for {{ $value | humanizeDuration }}, of a communicator that makes more than %(pace)g a second. ' % n.NcclCollectiveStuck + missing + ' Who used to come last on this node: ' +
                       text.list(c, 'topk(8, max by (namespace, pod, rank) (rank:chandra_nccl_last_arrivals:ratio_rate%(w)s{%%s} > 0))' % f, ['cluster', 'node', 'namespace'], text.podItem('rank {{ $row.Labels.rank }} ({{ $row.Value | humanizePercentage }})')) + '.',
        },
        {
          alert: 'NcclCollectiveWaits',
          expr: |||
            max by (%(cluster)s, %(node)s, namespace, pod) (pod_communicator:chandra_nccl_pending_seconds:max) > %(threshold)g
            unless
            pod:chandra_nccl_stuck_seconds:max
          ||| % (f + n.NcclCollectiveWaits),
          summary: text.pod(c) + ' waits in a NCCL collective.',
          description: text.pod(c) + ': a NCCL collective has been under way for {{ $value | humanizeDuration }}, of a communicator that is slow or known to pause. ' + missing,
        },
        {
          alert: 'NcclInitSlow',
          expr: 'pod_phase:chandra_nccl_init_seconds:p90_increase%(init)s{phase="total"} > %(threshold)g' % (f + n.NcclInitSlow),
          summary: text.pod(c) + ': NCCL takes long to initialise.',
          description: text.pod(c) + ': of the communicators of the last %(init)s, one in ten took longer than {{ $value | humanizeDuration }} to initialise; by phase: ' % f +
                       text.list(c, 'pod_phase:chandra_nccl_init_seconds:p90_increase%(init)s{%%s,phase!="total"} >= 0' % f, ['cluster', 'node', 'namespace', 'pod'], '{{ $row.Labels.phase }} {{ $row.Value | humanizeDuration }}') +
                       ' (estimates: the buckets grow by four). Time in rendezvous is mostly the wait for the last rank to start.',
        },
      ],

      local where = panels.where(c, ['cluster', 'node', 'namespace', 'pod']),
      local whereNode = panels.where(c, ['cluster', 'node', 'namespace']),
      local p = f { where: where, whereNode: whereNode },
      local legend = '{{namespace}} {{pod}} {{%(node)s}}' % f,

      panels: [
        panels.timeseries(
          'Wait for the last rank, per collective',
          'What the ranks of a node wait in one collective, by communicator. Above the line with one rank last most of the time, NcclStraggler fires. High with no such rank: the ranks take turns, or the network is slow. By the GPU where the plugin tells of all ranks, else by the host.',
          [{ expr: 'topk(10, communicator:chandra_nccl_judged_wait_seconds:mean%(w)s{%(whereNode)s})' % p, legend: '{{namespace}} {{communicator}} {{source}} {{%(node)s}}' % f }],
          's',
          [panels.above(n.NcclStraggler.threshold)],
        ),
        panels.timeseries(
          'Who arrives last',
          'Share of the collectives in which a rank was the last. Above the line it is the straggler: look at its GPU, its CPU and its data loader, not at the network.',
          [{ expr: 'topk(10, rank:chandra_nccl_last_arrivals:ratio_rate%(w)s{%(where)s})' % p, legend: '{{pod}} rank {{rank}} {{communicator}} {{source}}' }],
          'percentunit',
          [panels.above(n.NcclStraggler.lastArrivals)],
        ),
        panels.timeseries(
          'Which rank the job waits for, across nodes',
          'How much shorter than on average the collectives take on the GPU of a rank: it comes last, on whatever node, and the others wait that long for it in each. Below 0: it waits. From the profiler plugin (opt-in); a rank that is late only at times does not show.',
          [{ expr: 'topk(10, rank:chandra_nccl_waited_for_seconds:mean%(w)s{%(where)s})' % p, legend: '{{pod}} rank {{rank}} {{communicator}} {{%(node)s}}' % f }],
          's',
          [panels.above(n.NcclStraggler.threshold)],
          min=null,
        ),
        panels.timeseries(
          'Oldest collective under way',
          'Above the line NcclCollectiveStuck fires, where there were many a second and the pod is not known to pause: a rank never arrived, or its packets do not. A saw that comes back is a checkpoint, or a server without requests.',
          [{ expr: 'topk(20, pod:chandra_nccl_oldest_pending_seconds:max{%(where)s})' % p, legend: legend }],
          's',
          [panels.above(n.NcclCollectiveStuck.threshold)],
        ),
        panels.timeseries(
          'Whom the others wait for',
          'Ranks of their own node that have not called a collective for which others wait, after 10 s. running or sleeping: py-spy shows where; stopped: a debugger or a signal; gone: it died, and the others do not know. Nothing here while a collective is under way: the rank is on another node.',
          [{ expr: 'topk(20, chandra_nccl_missing_rank_seconds{%(sel)s, %(where)s})' % p, legend: '{{pod}} rank {{rank}} {{state}} {{%(node)s}}' % f }],
          's',
        ),
        panels.timeseries(
          'Arrival wait, p99',
          'Last arrival minus own arrival, by operation. source=host is the host call, source=kernel the GPU (profiler plugin).',
          [{ expr: 'topk(10, pod_operation_source:chandra_nccl_arrival_wait_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend + ' {{operation}} {{source}}' }],
          's',
        ),
        panels.timeseries(
          'Duration of collectives on the GPU, p99',
          'First channel start to last channel stop, from the profiler plugin (opt-in). Slow here with little arrival wait is the network.',
          [{ expr: 'topk(10, pod_operation:chandra_nccl_collective_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend + ' {{operation}}' }],
          's',
        ),
        panels.timeseries(
          'Initialisation by phase, p90',
          'Of the last %(init)s. rendezvous: ranks that start late or DNS; allocate: memory; transports: queue pairs and sockets.' % f,
          [{ expr: 'topk(20, pod_phase:chandra_nccl_init_seconds:p90_increase%(init)s{%(where)s})' % p, legend: legend + ' {{phase}}' }],
          's',
          [panels.above(n.NcclInitSlow.threshold)],
        ),
        panels.timeseries(
          'Host time of NCCL calls, p99',
          'How long the call takes on the host. It is not the duration of the collective.',
          [{ expr: 'topk(10, pod_operation:chandra_nccl_enqueue_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend + ' {{operation}}' }],
          's',
        ) + panels.wide,
        panels.timeseries(
          'Collectives per rank',
          'Ranks of one communicator do the same number; one that falls behind has a collective under way.',
          [{ expr: 'topk(20, rank:chandra_nccl_collectives:rate%(w)s{%(where)s})' % p, legend: '{{pod}} rank {{rank}} {{communicator}} {{source}}' }],
          'ops',
        ) + panels.wide,
      ],
    },
  },
}
