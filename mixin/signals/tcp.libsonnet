// TCP: which pods send segments again, and why.
local nodes = import '../lib/nodes.libsonnet';
local panels = import '../lib/panels.libsonnet';
local text = import '../lib/text.libsonnet';

{
  _config+:: {
    tcp: {
      // Bytes of a segment on the wire: 8948 with jumbo frames, 1448 with an MTU of 1500. What a pod sends is known in
      // packets, of which each may be cut into many segments by the NIC, and in bytes: the larger count is taken, and it is
      // rather too small than too large.
      segmentBytes: 8948,
      // Retransmitted segments a second of one pod. A healthy pod in a data centre sends none for minutes; ten is one
      // segment in a hundred at a thousand a second, where throughput of one connection is already halved. `share`: of the
      // segments that it sends, where that is known: one that sends a million a second loses ten and nobody feels it. Not of
      // the kinds for which nothing came back at all: each is a connection that stands still.
      TcpRetransmitsHigh: { threshold: 10, share: 0.01, 'for': '5m', severity: 'ticket' },
    },
  },

  signals+:: {
    tcp: {
      local c = $._config,
      local f = {
        w: c.window,
        cluster: c.clusterLabel,
        node: c.nodeLabel,
        sel: c.selector,
        cadvisor: c.cadvisorSelector,
        kubeStateMetrics: c.kubeStateMetricsSelector,
        nodeExporter: c.nodeExporterSelector,
        segment: c.tcp.segmentBytes,
      },

      title: 'TCP',
      question: 'Which pods send segments again, and why?',

      rules: [
        {
          record: 'pod_kind:chandra_tcp_retransmits:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod, kind) (rate(chandra_tcp_retransmits_total{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'pod:chandra_tcp_retransmits:rate%(w)s' % f,
          expr: 'sum without (kind) (pod_kind:chandra_tcp_retransmits:rate%(w)s)' % f,
        },
        {
          // Segments that a pod sends, at least: cAdvisor's packets, or its bytes where the NIC cuts packets. In a pod of the
          // host's network it counts the host's.
          record: 'pod:container_network_transmit_segments:rate%(w)s' % f,
          expr: |||
            max by (%(cluster)s, namespace, pod) (
              label_replace(
                sum by (%(cluster)s, namespace, pod) (max by (%(cluster)s, namespace, pod, interface) (rate(container_network_transmit_packets_total{pod!="", %(cadvisor)s}[%(w)s]))),
                "unit", "packets", "", ""
              )
              or
              label_replace(
                sum by (%(cluster)s, namespace, pod) (max by (%(cluster)s, namespace, pod, interface) (rate(container_network_transmit_bytes_total{pod!="", %(cadvisor)s}[%(w)s]))) / %(segment)d,
                "unit", "bytes", "", ""
              )
            )
            unless on (%(cluster)s, namespace, pod)
            kube_pod_info{host_network="true", %(kubeStateMetrics)s}
          ||| % f,
        },
        {
          // Of the host's own network, by the kernel.
          record: 'node:node_netstat_tcp_out_segments:rate%(w)s' % f,
          expr: 'max by (%(cluster)s, %(node)s) (\n%%s)' % f % nodes.named(
            c,
            'max by (%(cluster)s, instance) (rate(node_netstat_Tcp_OutSegs{%(nodeExporter)s}[%(w)s]))' % f
          ),
        },
        {
          record: 'pod:chandra_tcp_retransmits:ratio_rate%(w)s' % f,
          expr: |||
            pod:chandra_tcp_retransmits:rate%(w)s{namespace!=""}
            / on (%(cluster)s, namespace, pod) group_left ()
            pod:container_network_transmit_segments:rate%(w)s
            or
            pod:chandra_tcp_retransmits:rate%(w)s{namespace="", pod=""}
            / on (%(cluster)s, %(node)s) group_left ()
            node:node_netstat_tcp_out_segments:rate%(w)s
          ||| % f,
        },
      ],

      alerts: [
        {
          alert: 'TcpRetransmitsHigh',
          expr: |||
            pod:chandra_tcp_retransmits:rate%(w)s > %(threshold)g
            unless
            (
              pod:chandra_tcp_retransmits:ratio_rate%(w)s <= %(share)g
              unless
              sum without (kind) (pod_kind:chandra_tcp_retransmits:rate%(w)s{kind!~"fast|probe"}) > %(threshold)g
            )
          ||| % (f + c.tcp.TcpRetransmitsHigh),
          summary: text.pod(c) + ' retransmits TCP segments.',
          description: text.pod(c) + ' retransmits ' + text.number('$value') + ' TCP segments a second; by kind: ' +
                       text.list(c, 'pod_kind:chandra_tcp_retransmits:rate%(w)s{%%s} > 0' % f, ['cluster', 'node', 'namespace', 'pod'], '{{ $row.Labels.kind }} ' + text.number('$row.Value') + '/s') +
                       '. Of what it sends: ' +
                       text.list(c, 'pod:chandra_tcp_retransmits:ratio_rate%(w)s{%%s}' % f, ['cluster', 'node', 'namespace', 'pod'], '{{ $row.Value | humanizePercentage }}', none='not known') +
                       '. fast is loss on the path, rto a peer or path that went silent, syn a peer that does not answer.',
        },
      ],

      local where = panels.where(c, ['cluster', 'node', 'namespace', 'pod']),
      // The worst pods of the time that is shown, as rows that do not come and go with each step.
      local worst(n) = |||
        pod:chandra_tcp_retransmits:rate%(w)s{%(where)s}
        and on (%(cluster)s, %(node)s, namespace, pod)
        topk(%(n)d, avg_over_time(pod:chandra_tcp_retransmits:rate%(w)s{%(where)s}[$__range] @ end()) > 0)
      ||| % (f { where: where, n: n }),

      first:: panels.heatmap(
        'TCP retransmits per pod',
        'Segments sent again a second, one row per pod: the 20 pods with most in the time shown. These are the pods whose p99 suffers first; a row with a node alone is the host itself. Runbook: TcpRetransmitsHigh.',
        { expr: worst(20), legend: '{{namespace}} {{pod}} {{%(node)s}}' % f },
        panels.perSecond,
      ),

      panels: [
        $.signals.tcp.first { w: 24, h: 11 },
        panels.timeseries(
          'Retransmits per pod',
          'The ten pods with most. Above the line the alert fires. One pod: look at its node and link; all pods of a node: at the NIC; all nodes: at the switch. A socket is its maker\'s: behind Envoy or ztunnel the proxy stands here; of pods in gVisor or Kata nothing is seen (docs/owners.md).',
          [{ expr: worst(10), legend: '{{namespace}} {{pod}} {{%(node)s}}' % f }],
          panels.perSecond,
          [panels.above(c.tcp.TcpRetransmitsHigh.threshold)],
        ),
        panels.timeseries(
          'Retransmits by kind',
          'fast: loss on the path. rto: nothing came back for a whole timeout. syn: the peer does not answer; synack: the client does not. probe: tail loss probes, cheap.',
          [{ expr: 'sum by (kind) (pod_kind:chandra_tcp_retransmits:rate%(w)s{%(where)s})' % (f { where: where }), legend: '{{kind}}' }],
          panels.perSecond,
          stack=true,
        ),
        panels.timeseries(
          'Retransmits per node',
          'One node that stands out has a bad link, NIC or cable.',
          [{ expr: 'topk(20, sum by (%(node)s) (pod:chandra_tcp_retransmits:rate%(w)s{%(where)s}))' % (f { where: where }), legend: '{{%(node)s}}' % f }],
          panels.perSecond,
        ),
        panels.table(
          'Worst pods now',
          'The 20 pods that retransmit most at the end of the time shown.',
          'topk(20, pod:chandra_tcp_retransmits:rate%(w)s{%(where)s} > 0)' % (f { where: where }),
          panels.perSecond,
          ['namespace', 'pod', c.nodeLabel],
          'retransmits',
        ),
      ],
    },
  },
}
