// Encryption: what WireGuard and IPsec cost, whose traffic it is, and sessions that are derived too often.
local nodes = import '../lib/nodes.libsonnet';
local panels = import '../lib/panels.libsonnet';
local rates = import '../lib/rates.libsonnet';
local text = import '../lib/text.libsonnet';

{
  _config+:: {
    encryption: {
      // Sessions a minute with one peer. WireGuard derives one every two minutes while there is traffic, an IPsec key
      // rotation a few per remote node; one every 30 s is a rebuild that nobody asked for, and each costs a handshake
      // during which packets queue. `steady`: in how many fifths of the window at least. A failover establishes all of a
      // gateway's child SAs again, six or nine sessions with one peer at once, and no more: that is one fifth, or two.
      EncryptionRekeyStorm: { threshold: 2, steady: 3, 'for': '1m', severity: 'page' },
      // CPU seconds a second that the encryption of one pod's traffic takes: one whole core.
      EncryptionCpuHigh: { threshold: 1, 'for': '10m', severity: 'ticket' },
      // The same of a node, of all pods that are below that: four cores that nobody asked for, and no pod stands out.
      EncryptionNodeCpuHigh: { threshold: 4, 'for': '10m', severity: 'ticket' },
    },
  },

  signals+:: {
    encryption: {
      local c = $._config,
      local e = c.encryption,
      local f = { step: rates.step(c), w: c.window, cluster: c.clusterLabel, node: c.nodeLabel, sel: c.selector, nodeExporter: c.nodeExporterSelector, cilium: c.ciliumSelector },

      title: 'Encryption',
      question: 'What do WireGuard and IPsec cost, whose traffic is it, and are sessions derived too often?',

      rules: [
        {
          record: 'pod_direction:chandra_encryption_cpu_seconds:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod, direction) (rate(chandra_encryption_cpu_seconds_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'pod:chandra_encryption_cpu_seconds:rate%(w)s' % f,
          expr: 'sum without (direction) (pod_direction:chandra_encryption_cpu_seconds:rate%(w)s)' % f,
        },
        {
          record: 'node:chandra_encryption_cpu_seconds:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s) (pod:chandra_encryption_cpu_seconds:rate%(w)s)' % f,
        },
        {
          record: 'pod:chandra_encryption_bytes:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod) (rate(chandra_encryption_bytes_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'pod:chandra_encryption_packets:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod) (rate(chandra_encryption_packets_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'interface:chandra_encryption_sessions:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, interface, protocol) (rate(chandra_encryption_sessions_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          // Per peer: a hundred healthy peers do not hide one that rebuilds, and an agent's restart, one session more
          // for each of them, is no storm.
          record: 'interface:chandra_encryption_peer_sessions:max_rate%(w)s' % f,
          expr: 'max by (%(cluster)s, %(node)s, interface, protocol) (rate(chandra_encryption_peer_sessions_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          // Of the peers with which sessions rose in most of the last minutes.
          record: 'interface:chandra_encryption_peer_sessions:max_steady_rate%(w)s' % f,
          expr: |||
            max by (%(cluster)s, %(node)s, interface, protocol) (
              rate(%(sessions)s[%(w)s])
              and
              sum_over_time((
                %(sessions)s - (%(sessions)s offset %(step)s or %(sessions)s * 0) > bool 0
              )[%(w)s:%(step)s]) >= %(steady)d
            )
          ||| % (f + e.EncryptionRekeyStorm { sessions: 'chandra_encryption_peer_sessions_total{%(sel)s}' % f }),
        },
        {
          record: 'interface:chandra_encryption_session_interval_seconds:p50_rate%(w)s' % f,
          expr: 'histogram_quantile(0.5, sum by (%(cluster)s, %(node)s, interface, protocol, le) (rate(chandra_encryption_session_interval_seconds_bucket{%(sel)s}[%(w)s])))' % f,
        },
        {
          record: 'interface_event:chandra_encryption_handshakes:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, interface, protocol, event) (rate(chandra_encryption_handshakes_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'node_mode:node_cpu_seconds:rate%(w)s' % f,
          // Several jobs may scrape one node_exporter.
          expr: 'max by (%(cluster)s, %(node)s, mode) (\n%%s)' % f % nodes.named(
            c,
            'sum by (%(cluster)s, instance, mode) (max by (%(cluster)s, instance, mode, cpu) (rate(node_cpu_seconds_total{mode=~"softirq|system", %(nodeExporter)s}[%(w)s])))' % f
          ),
        },
        {
          record: 'node_map:cilium_bpf_map_ops_failed:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, map_name) (rate(cilium_bpf_map_ops_total{outcome="fail", %(cilium)s}[%(w)s]))' % f,
        },
      ],

      local most = text.list(c, 'topk(5, pod:chandra_encryption_bytes:rate%(w)s{%%s} > 0)' % f, ['cluster', 'node'], text.podItem('{{ $row.Value | humanize1024 }}B/s')),

      // IPsec needs no interface.
      local tunnel = '{{ $labels.protocol }} on ' + text.node(c) + '{{ with $labels.interface }} ({{ . }}){{ end }}',

      alerts: [
        {
          alert: 'EncryptionRekeyStorm',
          expr: 'interface:chandra_encryption_peer_sessions:max_steady_rate%(w)s * 60 > %(threshold)g' % (f + e.EncryptionRekeyStorm),
          summary: tunnel + ' rebuilds its sessions all the time.',
          description: tunnel + ' derives ' + text.number('$value') + ' sessions a minute with one peer. WireGuard needs one in two minutes, IPsec a few in a key rotation; packets queue during each handshake. Pods with most encrypted traffic on this node: ' + most + '.',
        },
        {
          alert: 'EncryptionCpuHigh',
          expr: 'pod:chandra_encryption_cpu_seconds:rate%(w)s > %(threshold)g' % (f + e.EncryptionCpuHigh),
          summary: text.pod(c) + ': the encryption of its traffic takes ' + text.number('$value') + ' CPU cores.',
          description: text.pod(c) + ': encrypting and decrypting its traffic takes ' + text.number('$value') + ' CPU cores. Pods with most encrypted traffic on this node: ' + most + '.',
        },
        {
          alert: 'EncryptionNodeCpuHigh',
          expr: 'sum by (%(cluster)s, %(node)s) (pod:chandra_encryption_cpu_seconds:rate%(w)s <= %(pod)g) > %(threshold)g' % (f + e.EncryptionNodeCpuHigh { pod: e.EncryptionCpuHigh.threshold }),
          summary: 'Encryption takes ' + text.number('$value') + ' CPU cores of ' + text.node(c) + '.',
          description: 'On ' + text.node(c) + ', encrypting and decrypting the traffic of many pods takes ' + text.number('$value') + ' CPU cores, of each at most %(pod)g. Pods with most encrypted traffic on this node: ' % { pod: e.EncryptionCpuHigh.threshold } + most + '.',
        },
      ],

      local whereNode = panels.where(c, ['cluster', 'node']),
      local where = panels.where(c, ['cluster', 'node', 'namespace', 'pod']),
      local p = f { where: where, whereNode: whereNode },
      local legend = '{{namespace}} {{pod}} {{%(node)s}}' % f,
      local sessions = { expr: 'topk(5, interface:chandra_encryption_peer_sessions:max_rate%(w)s{%(whereNode)s} * 60)' % p, legend: '{{%(node)s}} {{interface}} sessions' % f },

      first:: panels.timeseries(
        'Encryption CPU time',
        'CPU cores by node (left), and sessions derived a minute with the worst peer of an interface (thick, right). Half a session a minute is normal; above the dashed line they turn red: the encryption context is rebuilt all the time. Runbook: EncryptionRekeyStorm.',
        [
          { expr: 'topk(10, node:chandra_encryption_cpu_seconds:rate%(w)s{%(whereNode)s})' % p, legend: '{{%(node)s}} CPU' % f },
          sessions,
        ],
        panels.cores,
      ) + panels.onTheRight(['B'], 'short', 'sessions a minute with one peer', [panels.above(e.EncryptionRekeyStorm.threshold)]),

      panels: [
        $.signals.encryption.first + panels.wide { h: 9 },
        panels.timeseries(
          'Encryption CPU by pod',
          'Whose packets cost it: the inner source of what is encrypted, the inner destination of what is decrypted. What a proxy sends with a pod\'s own address is that pod\'s; after SNAT it is the node\'s (docs/owners.md). Above the line EncryptionCpuHigh fires.',
          [{ expr: 'topk(10, pod:chandra_encryption_cpu_seconds:rate%(w)s{%(where)s})' % p, legend: legend }],
          panels.cores,
          [panels.above(e.EncryptionCpuHigh.threshold)],
        ),
        panels.timeseries(
          'Encrypted traffic by pod',
          'Bytes a second, before encryption.',
          [{ expr: 'topk(10, pod:chandra_encryption_bytes:rate%(w)s{%(where)s})' % p, legend: legend }],
          'Bps',
        ),
        panels.timeseries(
          "The node's softirq and system CPU beside it",
          'Encryption runs in these. If it is most of them, it is what the node is busy with. Needs node_exporter.',
          [
            { expr: 'topk(10, node:chandra_encryption_cpu_seconds:rate%(w)s{%(whereNode)s})' % p, legend: '{{%(node)s}} encryption' % f },
            { expr: 'topk(10, node_mode:node_cpu_seconds:rate%(w)s{%(whereNode)s})' % p, legend: '{{%(node)s}} {{mode}}' % f },
          ],
          panels.cores,
        ),
        panels.timeseries(
          "The agent's failed operations on BPF maps",
          "Changes that the kernel refused, by map. All the time: a full map, or an agent that writes the same peers and endpoints again and again, which softirq and system CPU show as well. A few while an agent starts are normal.",
          [{ expr: 'topk(10, node_map:cilium_bpf_map_ops_failed:rate%(w)s{%(whereNode)s})' % p, legend: '{{%(node)s}} {{map_name}}' % f }],
          'ops',
        ),
        panels.timeseries(
          'CPU time per byte',
          'High with small packets. A rise without a change of traffic is a CPU without AES or a core that is shared.',
          [{ expr: 'topk(10, pod:chandra_encryption_cpu_seconds:rate%(w)s{%(where)s} / (pod:chandra_encryption_bytes:rate%(w)s{%(where)s} > 0))' % p, legend: legend }],
          's',
        ),
        panels.timeseries(
          'Sessions derived a minute',
          'All peers of an interface together. WireGuard: one every 120 s for each peer with traffic.',
          [{ expr: 'topk(10, interface:chandra_encryption_sessions:rate%(w)s{%(whereNode)s} * 60)' % p, legend: '{{%(node)s}} {{interface}}' % f }],
          'short',
        ),
        panels.timeseries(
          'Time between sessions with a peer, median',
          'WireGuard keeps a session for 120 s. A few seconds here are the rebuild. An estimate: the buckets grow by four.',
          [{ expr: 'bottomk(10, interface:chandra_encryption_session_interval_seconds:p50_rate%(w)s{%(whereNode)s})' % p, legend: '{{%(node)s}} {{interface}}' % f }],
          'suffix:s',
        ),
        panels.timeseries(
          'Handshakes',
          'Initiated without completed: the peer does not answer. Expired: sessions that nobody renewed.',
          [{ expr: 'topk(10, interface_event:chandra_encryption_handshakes:rate%(w)s{%(whereNode)s})' % p, legend: '{{%(node)s}} {{interface}} {{event}}' % f }],
          panels.perSecond,
        ),
        panels.timeseries(
          'Packets by pod',
          'Encrypted and decrypted.',
          [{ expr: 'topk(10, pod:chandra_encryption_packets:rate%(w)s{%(where)s})' % p, legend: legend }],
          'pps',
        ) + panels.wide,
      ],
    },
  },
}
