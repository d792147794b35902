// RDMA: whose queue pairs come and go, are stuck, or are slow to connect.
local panels = import '../lib/panels.libsonnet';
local rates = import '../lib/rates.libsonnet';
local text = import '../lib/text.libsonnet';

{
  _config+:: {
    rdma: {
      // How far spike and churn look back.
      spikeWindow: '10m',
      churnWindow: '1h',
      // Below this many queue pairs there is no job to protect: one client of perftest has a pair or two.
      pairsFloor: 6,

      // How often a container's queue pairs were torn down within the spike window, relative to the most that it had since
      // ten minutes before it. A job that starts only builds, one that ends tears down once. A worker that fails right after
      // its start comes back three times in ten minutes; at the end of its back-off twice, which is churn.
      RdmaQueuePairSpike: { threshold: 2.5, 'for': '1m', severity: 'ticket' },
      // The same over the churn window: a worker in CrashLoopBackOff comes back about twelve times an hour.
      RdmaQueuePairChurn: { threshold: 4, 'for': '5m', severity: 'ticket' },
      // Queue pairs of one pod in the state ERR, all the time: an orderly close passes it within seconds. Any one is a
      // connection that carries nothing.
      RdmaQueuePairErrors: { 'for': '2m', severity: 'page' },
      // The same of the host: the kernel's own pairs, of storage. Its users wait and connect again by themselves (NVMe-oF
      // each ten seconds, for ten minutes).
      RdmaHostQueuePairErrors: { 'for': '5m', severity: 'ticket' },
      // Seconds that nine in ten resolutions of an address or a route stay below. Both are one or two packets on the
      // fabric, microseconds to milliseconds; librdmacm's users give up after 1 or 2 s. The bound of a bucket (they grow
      // by four from a microsecond): a quantile within one is a guess.
      RdmaResolutionSlow: { threshold: 1.048576, 'for': '10m', severity: 'ticket' },
      // Seconds since the kernel last reported a device's queue pairs, asked every 10 s: above, the gauge is history.
      RdmaEnumerationStale: { threshold: 120, 'for': '5m', severity: 'ticket' },
    },
  },

  signals+:: {
    rdma: {
      local c = $._config,
      local r = c.rdma,
      local f = { w: c.window, cluster: c.clusterLabel, node: c.nodeLabel, sel: c.selector, spike: r.spikeWindow, churn: r.churnWindow, floor: r.pairsFloor },
      local node = '%(cluster)s, %(node)s' % f,
      local owner = node + ', namespace, pod, container',
      local increase(metric, labels, window) = rates.increase(c, metric, ['namespace', 'pod', 'container'] + labels, window),
      // By pod and `by`, of the labels that the metric has of its own.
      local rate(metric, by=[], labels=by) =
        'sum by (%s) (%s) / %d' % [std.join(', ', [node, 'namespace', 'pod'] + by), increase(metric, labels, c.window), rates.seconds(c.window)],
      local quantile(metric, labels=[]) =
        'histogram_quantile(0.9, sum by (%s, namespace, pod, le) (%s))' % [node, increase(metric + '_bucket', labels + ['le'], c.window)],

      // The smaller of what was created and what was destroyed is what was replaced. The counters are per device and
      // there from the exporter's start, so they know pods that were born and gone between two scrapes.
      local replaced(window) = {
        record: 'node:chandra_rdma_queue_pairs_replaced:increase' + window,
        expr: |||
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
      },
      local destroyed(window) = {
        record: 'container:chandra_rdma_queue_pairs_destroyed:increase' + window,
        expr: 'sum by (%s) (%s)' % [owner, increase('chandra_rdma_queue_pairs_destroyed_total', [], window)],
      },
      // What the node replaced beyond what the owners tore down whose pairs lasted.
      local brief(window) = {
        record: 'node:chandra_rdma_queue_pairs_replaced_briefly:increase' + window,
        expr: |||
          clamp_min(
            node:chandra_rdma_queue_pairs_replaced:increase%(window)s
            - (
              sum by (%(node)s) (
                container:chandra_rdma_queue_pairs_destroyed:increase%(window)s
                and
                max_over_time(container:chandra_rdma_queue_pairs_lasting:sum[%(window)s])
              )
              or
              node:chandra_rdma_queue_pairs_replaced:increase%(window)s * 0
            ),
            0
          )
        ||| % (f { node: node, window: window }),
      },
      // Relative to the most pairs within the window or in the ten minutes before it: a large job that starts and ends
      // beside a few lasting pairs replaced none of them. The spike wants pairs from before the window: two short tests
      // are no incident. A job younger than the churn window is compared with its own pairs.
      local ratio(level, what, window) = {
        record: '%s:chandra_rdma_queue_pairs_%s:ratio%s' % [level, what, window],
        expr: |||
          %(level)s:chandra_rdma_queue_pairs_%(what)s:increase%(window)s
          /
        ||| % { level: level, what: what, window: window } + (if window == r.spikeWindow then |||
          (
            max_over_time(%(level)s:chandra_rdma_queue_pairs:max%(spike)s[%(spike)s])
            and
            %(level)s:chandra_rdma_queue_pairs:max%(spike)s offset %(spike)s >= %(floor)d
          )
        ||| else |||
          (max_over_time(%(level)s:chandra_rdma_queue_pairs:max%(spike)s[%(churn)s]) >= %(floor)d)
        |||) % (f { level: level }),
      },

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
          record: 'container:chandra_rdma_queue_pairs:sum',
          expr: 'sum by (%(owner)s) (chandra_rdma_queue_pairs{type!~"SMI|GSI", %(sel)s})' % (f { owner: owner }),
        },
        {
          // Of who has pairs that last, which a worker that dies at its start has not.
          record: 'container:chandra_rdma_queue_pairs_lasting:sum',
          expr: 'container:chandra_rdma_queue_pairs:sum and container:chandra_rdma_queue_pairs:sum offset %(w)s' % f,
        },
        { record: 'pod:chandra_rdma_queue_pairs_created:rate%(w)s' % f, expr: rate('chandra_rdma_queue_pairs_created_total') },
        { record: 'pod:chandra_rdma_queue_pairs_destroyed:rate%(w)s' % f, expr: rate('chandra_rdma_queue_pairs_destroyed_total') },
        // While workers crash, the count at one moment may be 0.
        { record: 'node:chandra_rdma_queue_pairs:max%(spike)s' % f, expr: 'max_over_time(node:chandra_rdma_queue_pairs:sum[%(spike)s])' % f },
        { record: 'container:chandra_rdma_queue_pairs:max%(spike)s' % f, expr: 'max_over_time(container:chandra_rdma_queue_pairs:sum[%(spike)s])' % f },
      ] + std.flattenArrays([
        [
          destroyed(window),
          ratio('container', 'destroyed', window),
          replaced(window),
          brief(window),
          ratio('node', 'replaced_briefly', window),
        ]
        for window in [r.spikeWindow, r.churnWindow]
      ]) + [
        {
          record: 'pod:chandra_rdma_queue_pairs_error:sum',
          expr: |||
            sum by (%(cluster)s, %(node)s, namespace, pod) (
              chandra_rdma_queue_pairs{state="ERR", type!~"SMI|GSI", %(sel)s}
              unless
              chandra_rdma_queue_pairs{namespace="", pod="", container="", %(sel)s}
            )
          ||| % f,
        },
        {
          record: 'node:chandra_rdma_host_queue_pairs_error:sum',
          expr: 'sum by (%(cluster)s, %(node)s) (chandra_rdma_queue_pairs{state="ERR", type!~"SMI|GSI", namespace="", pod="", container="", %(sel)s})' % f,
        },
        { record: 'pod:chandra_rdma_address_resolution_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_address_resolution_seconds', ['result']) },
        { record: 'pod:chandra_rdma_route_resolution_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_route_resolution_seconds', ['result']) },
        { record: 'pod:chandra_rdma_queue_pair_connect_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_queue_pair_connect_seconds') },
        { record: 'pod:chandra_rdma_queue_pair_lifetime_seconds:p90_rate%(w)s' % f, expr: quantile('chandra_rdma_queue_pair_lifetime_seconds') },
        { record: 'pod_event:chandra_rdma_queue_pair_events:rate%(w)s' % f, expr: rate('chandra_rdma_queue_pair_events_total', ['event']) },
        { record: 'pod:chandra_rdma_memory_registered_bytes:rate%(w)s' % f, expr: rate('chandra_rdma_memory_registered_bytes_total', labels=['kind']) },
      ],

      // Of the alert's own window: in CrashLoopBackOff the last restart is longer ago than a rate looks back.
      local culprits(window) =
        'Torn down on the node, by pod: ' +
        text.list(c, 'topk(5, sum by (namespace, pod) (container:chandra_rdma_queue_pairs_destroyed:increase%s{%%s}) > 0)' % window, ['cluster', 'node'], text.podItem('{{ printf "%.0f" $row.Value }}')) +
        '.',
      local times = '{{ printf "%.1f" $value }} times over',
      // Whose pairs: of one who can be told from others (not of the host, nor of what is folded into one label), or of those
      // that do not last.
      local again(threshold, window) = |||
        container:chandra_rdma_queue_pairs_destroyed:ratio%(window)s > %(threshold)g
        unless
        container:chandra_rdma_queue_pairs_destroyed:ratio%(window)s{namespace="", container=""}
        or
        node:chandra_rdma_queue_pairs_replaced_briefly:ratio%(window)s > %(threshold)g
      ||| % { threshold: threshold, window: window },
      local whose(seen, unseen) = '{{ if or $labels.namespace $labels.container }}' + seen + '{{ else }}' + unseen + '{{ end }}',

      alerts: [
        {
          alert: 'RdmaQueuePairSpike',
          expr: again(r.RdmaQueuePairSpike.threshold, r.spikeWindow),
          summary: whose(text.container(c) + ' tears down and rebuilds its RDMA queue pairs.', 'Queue pairs on ' + text.node(c) + ' are torn down and rebuilt.'),
          description: whose(
            'Within %(spike)s the queue pairs of ' % f + text.container(c) + ' were torn down ' + times + ': it dies, or NCCL starts over. ',
            'Within %(spike)s the queue pairs on ' % f + text.node(c) + ' were replaced ' + times + ' by who lived for less than %(w)s: workers die as soon as they start. ' % f
          ) + culprits(r.spikeWindow),
        },
        {
          alert: 'RdmaQueuePairChurn',
          expr: again(r.RdmaQueuePairChurn.threshold, r.churnWindow),
          summary: whose(text.container(c) + ' keeps rebuilding its RDMA queue pairs.', 'Queue pairs on ' + text.node(c) + ' keep being rebuilt.'),
          description: whose(
            'Within %(churn)s the queue pairs of ' % f + text.container(c) + ' were torn down ' + times + ': it restarts again and again. ',
            'Within %(churn)s the queue pairs on ' % f + text.node(c) + ' were replaced ' + times + ' by who lived for less than %(w)s: something restarts again and again. ' % f
          ) + culprits(r.churnWindow),
        },
        {
          alert: 'RdmaQueuePairErrors',
          expr: 'pod:chandra_rdma_queue_pairs_error:sum > 0',
          summary: text.pod(c) + ' has queue pairs in error.',
          description: text.pod(c) + ' has queue pairs in state ERR that it does not close: {{ $value }}. They carry nothing, and a collective that needs one hangs. Retries exceeded, or the peer is gone.',
        },
        {
          alert: 'RdmaHostQueuePairErrors',
          expr: 'node:chandra_rdma_host_queue_pairs_error:sum > 0',
          summary: 'The host itself on ' + text.node(c) + ' has queue pairs in error.',
          description: 'The host itself on ' + text.node(c) + ' has queue pairs in state ERR: {{ $value }}. They are of the kernel (NVMe over Fabrics, NFS, Lustre, SMB) or of a process outside of pods: a target is gone, and who reads or writes there waits.',
        },
        {
          alert: 'RdmaResolutionSlow',
          expr: |||
            max without (phase) (
              label_replace(pod:chandra_rdma_address_resolution_seconds:p90_rate%(w)s, "phase", "address", "", "")
              or
              label_replace(pod:chandra_rdma_route_resolution_seconds:p90_rate%(w)s, "phase", "route", "", "")
            ) > %(threshold).9g
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

      local tornDown(window) = [
        { expr: 'topk(10, container:chandra_rdma_queue_pairs_destroyed:ratio%s{%s})' % [window, where], legend: legend },
        { expr: 'topk(5, node:chandra_rdma_queue_pairs_replaced_briefly:ratio%s{%s})' % [window, whereNode], legend: '{{%(node)s}} brief' % f },
      ],

      first:: panels.stat(
        'RDMA queue pair count',
        'Queue pairs of pods and host, and how often the worst pod tore down its own within %(spike)s. During a run the count is steady; red is above the spike threshold: workers die and rebuild. Runbook: RdmaQueuePairSpike.' % f,
        [
          { expr: 'sum(pod_state:chandra_rdma_queue_pairs:sum{%(where)s}) or sum(node:chandra_rdma_queue_pairs:sum{%(whereNode)s}) * 0' % p, legend: 'queue pairs' },
          { expr: 'round(max(container:chandra_rdma_queue_pairs_destroyed:ratio%(spike)s{%(where)s} or node:chandra_rdma_queue_pairs_replaced_briefly:ratio%(spike)s{%(whereNode)s}), 0.1) or sum(node:chandra_rdma_queue_pairs:sum{%(whereNode)s}) * 0' % p, legend: 'times torn down' },
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
          'Times torn down within %(spike)s' % p,
          'How often a pod tore down all its queue pairs, and a node those of pods that did not last. Above the line RdmaQueuePairSpike fires.',
          tornDown(r.spikeWindow),
          'short',
          [panels.above(r.RdmaQueuePairSpike.threshold)],
        ),
        panels.timeseries(
          'Times torn down within %(churn)s' % p,
          'The same over the longer window. Above the line RdmaQueuePairChurn fires.',
          tornDown(r.churnWindow),
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
