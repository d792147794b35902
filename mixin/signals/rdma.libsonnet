// RDMA: whose queue pairs come and go, are stuck, or are slow to connect.
local panels = import '../lib/panels.libsonnet';
local text = import '../lib/text.libsonnet';

{
  _config+:: {
    rdma: {
      // How far spike and churn look back.
      spikeWindow: '10m',
      churnWindow: '1h',
      // Below this many queue pairs on a node there is no job to protect: one client of perftest has a pair or two.
      pairsFloor: 6,

      // How often the node's queue pairs were both torn down and built again within the spike window, relative to the
      // most that existed since ten minutes before it. A job that starts only builds, one that ends only tears down, and
      // one job after another does each at most once: above 1 pairs are built and torn down again within the window.
      RdmaQueuePairSpike: { threshold: 1.5, 'for': '1m', severity: 'ticket' },
      // The same over the churn window: a worker in CrashLoopBackOff comes back about twelve times an hour.
      RdmaQueuePairChurn: { threshold: 4, 'for': '5m', severity: 'ticket' },
      // Queue pairs of one pod in the state ERR, all the time: an orderly close passes it within seconds. Any one is a
      // connection that carries nothing.
      RdmaQueuePairErrors: { 'for': '2m', severity: 'page' },
      // Seconds that nine in ten resolutions of an address or a route stay below. Both are one or two packets on the
      // fabric, microseconds to milliseconds; librdmacm's users give up after 1 or 2 s.
      RdmaResolutionSlow: { threshold: 0.5, 'for': '10m', severity: 'ticket' },
      // Seconds since the kernel last reported a device's queue pairs, asked every 10 s: above, the gauge is history.
      RdmaEnumerationStale: { threshold: 120, 'for': '5m', severity: 'ticket' },
    },
  },

  signals+:: {
    rdma: {
      local c = $._config,
      local r = c.rdma,
      local f = { w: c.window, cluster: c.clusterLabel, node: c.nodeLabel, sel: c.selector, spike: r.spikeWindow, churn: r.churnWindow, floor: r.pairsFloor },
      // The smaller of what was created and what was destroyed is what was replaced. The counters are per device and
      // there from the exporter's start, so a pod's first queue pairs are in them.
      local replaced(window) = |||
        min without (event) (
          label_replace(
            sum by (%(cluster)s, %(node)s) (increase(chandra_rdma_device_queue_pairs_created_total{%(sel)s}[%(window)s])),
            "event", "created", "", ""
          )
          or
          label_replace(
            sum by (%(cluster)s, %(node)s) (increase(chandra_rdma_device_queue_pairs_destroyed_total{%(sel)s}[%(window)s])),
            "event", "destroyed", "", ""
          )
        )
      ||| % (f { window: window }),
      local quantile(metric) = |||
        histogram_quantile(0.9, sum by (%(cluster)s, %(node)s, namespace, pod, le) (rate(%(metric)s_bucket{%(sel)s}[%(w)s])))
      ||| % (f { metric: metric }),

      title: 'RDMA',
      question: 'Whose queue pairs come and go, are stuck, or are slow to connect?',

      rules: [
        {
          // The kernel's own management pairs (SMI, GSI) are there as long as the device is.
          record: 'pod_state:chandra_rdma_queue_pairs:sum',
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod, state) (chandra_rdma_queue_pairs{type!~"SMI|GSI", %(sel)s})' % f,
        },
        {
          // Present at 0 where there are devices and no pair, so that a job's start is a step from 0.
          record: 'node:chandra_rdma_queue_pairs:sum',
          expr: |||
            sum by (%(cluster)s, %(node)s) (pod_state:chandra_rdma_queue_pairs:sum)
            or
            sum by (%(cluster)s, %(node)s) (chandra_rdma_enumeration_age_seconds{%(sel)s}) * 0
          ||| % f,
        },
        {
          record: 'pod:chandra_rdma_queue_pairs_created:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod) (rate(chandra_rdma_queue_pairs_created_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'pod:chandra_rdma_queue_pairs_destroyed:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod) (rate(chandra_rdma_queue_pairs_destroyed_total{%(sel)s}[%(w)s]))' % f,
        },
        // While workers crash, the count at one moment may be 0.
        { record: 'node:chandra_rdma_queue_pairs:max%(spike)s' % f, expr: 'max_over_time(node:chandra_rdma_queue_pairs:sum[%(spike)s])' % f },
        { record: 'node:chandra_rdma_queue_pairs_replaced:increase%(spike)s' % f, expr: replaced(r.spikeWindow) },
        { record: 'node:chandra_rdma_queue_pairs_replaced:increase%(churn)s' % f, expr: replaced(r.churnWindow) },
        {
          // Relative to the most pairs within the window or in the ten minutes before it: a large job that starts and
          // ends beside a few lasting pairs replaced none of them. Only where there were pairs before the window: two
          // short tests on an idle node are no incident.
          record: 'node:chandra_rdma_queue_pairs_replaced:ratio%(spike)s' % f,
          expr: |||
            node:chandra_rdma_queue_pairs_replaced:increase%(spike)s
            /
            (
              max_over_time(node:chandra_rdma_queue_pairs:max%(spike)s[%(spike)s])
              and
              node:chandra_rdma_queue_pairs:max%(spike)s offset %(spike)s >= %(floor)d
            )
          ||| % f,
        },
        {
          // A job younger than the window is compared with its own pairs.
          record: 'node:chandra_rdma_queue_pairs_replaced:ratio%(churn)s' % f,
          expr: |||
            node:chandra_rdma_queue_pairs_replaced:increase%(churn)s
            /
            (max_over_time(node:chandra_rdma_queue_pairs:max%(spike)s[%(churn)s]) >= %(floor)d)
          ||| % f,
        },
        {
          record: 'pod:chandra_rdma_queue_pairs_error:sum',
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod) (pod_state:chandra_rdma_queue_pairs:sum{state="ERR"})' % f,
        },
        { record: 'pod:chandra_rdma_address_resolution_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_address_resolution_seconds') },
        { record: 'pod:chandra_rdma_route_resolution_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_route_resolution_seconds') },
        { record: 'pod:chandra_rdma_queue_pair_connect_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_queue_pair_connect_seconds') },
        { record: 'pod:chandra_rdma_queue_pair_lifetime_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_queue_pair_lifetime_seconds') },
        {
          record: 'pod_event:chandra_rdma_queue_pair_events:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod, event) (rate(chandra_rdma_queue_pair_events_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'pod:chandra_rdma_memory_registered_bytes:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod) (rate(chandra_rdma_memory_registered_bytes_total{%(sel)s}[%(w)s]))' % f,
        },
      ],

      // Of the alert's own window: in CrashLoopBackOff the last restart is longer ago than a rate looks back. Destroyed,
      // not created: a new pod's first pairs come before its series, its last ones do not.
      local culprits(window) =
        'Torn down, by pod: ' +
        text.list(c, 'topk(5, sum by (namespace, pod) (increase(chandra_rdma_queue_pairs_destroyed_total{%%s,%(sel)s}[%(window)s])) > 0)' % (f { window: window }), ['cluster', 'node'], text.podItem('{{ printf "%.0f" $row.Value }}')) +
        '.',
      local times = '{{ printf "%.1f" $value }} times over',

      alerts: [
        {
          alert: 'RdmaQueuePairSpike',
          expr: 'node:chandra_rdma_queue_pairs_replaced:ratio%(spike)s > %(threshold)g' % (f + r.RdmaQueuePairSpike),
          summary: 'Queue pairs on ' + text.node(c) + ' are torn down and rebuilt.',
          description: 'Within %(spike)s the queue pairs on ' % f + text.node(c) + ' were replaced ' + times + ': workers die, or NCCL starts over. ' + culprits(r.spikeWindow),
        },
        {
          alert: 'RdmaQueuePairChurn',
          expr: 'node:chandra_rdma_queue_pairs_replaced:ratio%(churn)s > %(threshold)g' % (f + r.RdmaQueuePairChurn),
          summary: 'Queue pairs on ' + text.node(c) + ' keep being rebuilt.',
          description: 'Within %(churn)s the queue pairs on ' % f + text.node(c) + ' were replaced ' + times + ': something restarts again and again. ' + culprits(r.churnWindow),
        },
        {
          alert: 'RdmaQueuePairErrors',
          expr: 'pod:chandra_rdma_queue_pairs_error:sum > 0',
          summary: text.pod(c) + ' has queue pairs in error.',
          description: text.pod(c) + ' has queue pairs in state ERR that it does not close: {{ $value }}. They carry nothing, and a collective that needs one hangs. Retries exceeded, or the peer is gone.',
        },
        {
          alert: 'RdmaResolutionSlow',
          expr: |||
            max without (phase) (
              label_replace(pod:chandra_rdma_address_resolution_seconds:p90_rate%(w)s, "phase", "address", "", "")
              or
              label_replace(pod:chandra_rdma_route_resolution_seconds:p90_rate%(w)s, "phase", "route", "", "")
            ) > %(threshold)g
          ||| % (f + r.RdmaResolutionSlow),
          summary: text.pod(c) + ' resolves RDMA addresses slowly.',
          description: text.pod(c) + ' waits longer than {{ $value | humanizeDuration }} for one in ten RDMA address or route resolutions: connections are slow to come up, or time out.',
        },
        {
          alert: 'RdmaEnumerationStale',
          expr: 'max by (%(cluster)s, %(node)s) (chandra_rdma_enumeration_age_seconds{%(sel)s}) > %(threshold)g' % (f + r.RdmaEnumerationStale),
          summary: 'The count of RDMA queue pairs on ' + text.node(c) + ' is out of date.',
          description: 'A device on ' + text.node(c) + ' has not reported its queue pairs for {{ $value | humanizeDuration }}, so chandra_rdma_queue_pairs is that old. Devices: ' +
                       text.list(c, 'chandra_rdma_enumeration_age_seconds{%%s,%(sel)s}' % f, ['cluster', 'node'], '{{ $row.Labels.device }} {{ $row.Value | humanizeDuration }}') + '.',
        },
      ],

      local whereNode = panels.where(c, ['cluster', 'node']),
      local where = panels.where(c, ['cluster', 'node', 'namespace', 'pod']),
      local p = f { where: where, whereNode: whereNode },
      local legend = '{{namespace}} {{pod}} {{%(node)s}}' % f,

      first:: panels.stat(
        'RDMA queue pair count',
        'Queue pairs of pods and host, and how often the worst node replaced its own within %(spike)s. During a run the count is steady; red is above the spike threshold: workers die and rebuild. Runbook: RdmaQueuePairSpike.' % f,
        [
          { expr: 'sum(pod_state:chandra_rdma_queue_pairs:sum{%(where)s}) or sum(node:chandra_rdma_queue_pairs:sum{%(whereNode)s}) * 0' % p, legend: 'queue pairs' },
          { expr: 'max(node:chandra_rdma_queue_pairs_replaced:ratio%(spike)s{%(whereNode)s}) or sum(node:chandra_rdma_queue_pairs:sum{%(whereNode)s}) * 0' % p, legend: 'times replaced' },
          { expr: 'sum(pod_state:chandra_rdma_queue_pairs:sum{state="ERR", %(where)s}) or sum(node:chandra_rdma_queue_pairs:sum{%(whereNode)s}) * 0' % p, legend: 'in ERR' },
        ],
        'short',
      ) + panels.thresholdsOf('B', 'short', [panels.above(r.RdmaQueuePairSpike.threshold)])
        + panels.thresholdsOf('C', 'short', [panels.above(1)]),

      panels: [
        $.signals.rdma.first { w: 24, h: 6 },
        panels.timeseries(
          'Queue pairs per pod',
          'Steady during a run. Steps are jobs that start and end; a saw is workers that die.',
          [{ expr: 'topk(20, sum without (state) (pod_state:chandra_rdma_queue_pairs:sum{%(where)s}))' % p, legend: legend }],
          'short',
        ),
        panels.timeseries(
          'Queue pairs by state',
          'RTS carries data; many in INIT or RTR are connections that never finish; ERR that stays is a dead connection.',
          [{ expr: 'sum by (state) (pod_state:chandra_rdma_queue_pairs:sum{%(where)s})' % p, legend: '{{state}}' }],
          'short',
          stack=true,
        ),
        panels.timeseries(
          'Times replaced within %(spike)s' % p,
          'How often a node tore down and rebuilt all its queue pairs. Above the line RdmaQueuePairSpike fires.',
          [{ expr: 'topk(20, node:chandra_rdma_queue_pairs_replaced:ratio%(spike)s{%(whereNode)s})' % p, legend: '{{%(node)s}}' % f }],
          'short',
          [panels.above(r.RdmaQueuePairSpike.threshold)],
        ),
        panels.timeseries(
          'Times replaced within %(churn)s' % p,
          'The same over the longer window. Above the line RdmaQueuePairChurn fires.',
          [{ expr: 'topk(20, node:chandra_rdma_queue_pairs_replaced:ratio%(churn)s{%(whereNode)s})' % p, legend: '{{%(node)s}}' % f }],
          'short',
          [panels.above(r.RdmaQueuePairChurn.threshold)],
        ),
        panels.timeseries(
          'Created and destroyed per pod',
          'Who rebuilds. Created alone is a job that starts, destroyed alone one that ends.',
          [
            { expr: 'topk(10, pod:chandra_rdma_queue_pairs_created:rate%(w)s{%(where)s} > 0)' % p, legend: legend + ' created' },
            { expr: 'topk(10, pod:chandra_rdma_queue_pairs_destroyed:rate%(w)s{%(where)s} > 0)' % p, legend: legend + ' destroyed' },
          ],
          panels.perSecond,
        ),
        panels.timeseries(
          'Time to connect, p90',
          'From creation to ready to send. Slow here with fast resolution below is the peer; both slow is the fabric or its subnet manager.',
          [{ expr: 'topk(10, pod:chandra_rdma_queue_pair_connect_seconds:p90_rate%(w)s{%(where)s})' % p, legend: legend }],
          's',
        ),
        panels.timeseries(
          'Address and route resolution, p90',
          'rdma_resolve_addr and rdma_resolve_route until their event. Above the line RdmaResolutionSlow fires: look for lost ARP, a busy subnet manager, a wrong GID index.',
          [
            { expr: 'topk(10, pod:chandra_rdma_address_resolution_seconds:p90_rate%(w)s{%(where)s})' % p, legend: legend + ' address' },
            { expr: 'topk(10, pod:chandra_rdma_route_resolution_seconds:p90_rate%(w)s{%(where)s})' % p, legend: legend + ' route' },
          ],
          's',
          [panels.above(r.RdmaResolutionSlow.threshold)],
        ),
        panels.timeseries(
          'Lifetime of queue pairs, p90',
          'A training job keeps its pairs for its whole run. Minutes mean restarts.',
          [{ expr: 'topk(10, pod:chandra_rdma_queue_pair_lifetime_seconds:p90_rate%(w)s{%(where)s})' % p, legend: legend }],
          's',
        ),
        panels.timeseries(
          'Events reported by the device',
          'Asynchronous errors of queue pairs: fatal, access and request errors are a bug or a broken peer, path migration a link that went.',
          [{ expr: 'topk(10, pod_event:chandra_rdma_queue_pair_events:rate%(w)s{%(where)s} > 0)' % p, legend: legend + ' {{event}}' }],
          panels.perSecond,
        ),
        panels.timeseries(
          'Memory registered',
          'Bytes a second. Registration during a run, not only at its start, stalls the sender.',
          [{ expr: 'topk(10, pod:chandra_rdma_memory_registered_bytes:rate%(w)s{%(where)s} > 0)' % p, legend: legend }],
          'Bps',
        ),
      ],
    },
  },
}
