// Hubble and the Cilium agent: what Cilium drops, and whether Hubble itself sees it. No exporter half: these are
// Cilium's own metrics, with the labels that helm-values/cilium.yaml asks for.
local panels = import '../lib/panels.libsonnet';
local text = import '../lib/text.libsonnet';
local vocabulary = import '../lib/drop_reasons.libsonnet';

// hubble_drop_total has the name of the protobuf enum, cilium_drop_count_total a sentence. Reasons are written here in
// Hubble's vocabulary and translated by Cilium's own table.
local agentReason(reason) =
  if std.objectHas(vocabulary, reason) then vocabulary[reason] else error 'hubble: Cilium has no drop reason ' + reason;
local anyOf(list) = std.join('|', list);
local anyOfAgents(reasons) = anyOf(std.map(agentReason, reasons));

{
  _config+:: {
    hubble: {
      // Reasons with an alert of their own.
      conntrackReasons: ['CT_MAP_INSERTION_FAILED'],
      unencryptedReasons: ['UNENCRYPTED_TRAFFIC'],
      // What policy refuses. With policy verdict events (bpf.events.policyVerdict, on by default) Hubble sees such a packet
      // twice, and hubble_drop_total counts both: send_policy_verdict_notify and then the drop in bpf/bpf_lxc.c, both
      // DROPPED with one reason by decodeVerdict in pkg/hubble/parser/threefour (1.19).
      policyReasons: ['AUTH_REQUIRED', 'POLICY_DENIED', 'POLICY_DENY'],
      // Errors of XFRM on arrival that a wrong key or policy is the reason of: no state for the SPI, a state of another
      // protocol, a policy that wants another state.
      ipsecInboundErrors: ['no_state', 'state_protocol', 'template_mismatched'],
      // What a healthy cluster drops all the time: protocols that Cilium does not carry, packets to pods just gone.
      harmlessReasons: [
        'FORBIDDEN_ICMPV6_MESSAGE',
        'IGMP_HANDLED',
        'IGMP_SUBSCRIBED',
        'MULTICAST_HANDLED',
        'NAT_NOT_NEEDED',
        'STALE_OR_UNROUTABLE_IP',
        'UNSUPPORTED_L2_PROTOCOL',
        'UNSUPPORTED_L3_PROTOCOL',
      ],

      // Dropped packets a second in an inference namespace. One client that is refused sends its SYN six times in two
      // minutes, 0.05 a second: this is two of them, all the time.
      HubbleDropsHigh: { threshold: 0.1, 'for': '5m', severity: 'ticket' },
      // Packets a second whose connection could not be entered into conntrack, while the map is as full as in
      // HubbleConntrackPressure, or more than `share` of all packets that the agent forwards: new connections fail. The maps
      // are LRU: a full one throws out live connections first.
      HubbleConntrackFull: { threshold: 0.1, share: 0.001, 'for': '2m', severity: 'page' },
      // The same without either: insertions that fail one by one (EBUSY, cilium#35010).
      HubbleConntrackInsertionsFail: { threshold: 0.1, 'for': '10m', severity: 'ticket' },
      // Share of a conntrack map in use. Cilium's garbage collector keeps a healthy one well below; from here a burst of
      // connections fills it.
      HubbleConntrackPressure: { threshold: 0.8, 'for': '10m', severity: 'ticket' },
      // Nothing of Hubble or the agent in a cluster where Chandra runs.
      HubbleMetricsMissing: { 'for': '15m', severity: 'ticket' },
      // Drops or DNS queries a second of which none names a namespace.
      HubbleNamespacesMissing: { threshold: 0.1, 'for': '15m', severity: 'ticket' },
      // Packets a second that the agent forwards while Hubble counts no flow. Every node forwards health checks, so an
      // idle one is above it too.
      HubbleFlowsMissing: { threshold: 1, 'for': '10m', severity: 'ticket' },
      // Share of events that Hubble lost before it counted them: from here its counters are too low to compare.
      HubbleEventsLost: { threshold: 0.01, 'for': '10m', severity: 'ticket' },
      // Share of DNS responses that say the server failed or refused. A missing name is not one of them: search
      // domains ask for several that do not exist before the one that does.
      HubbleDnsErrorsHigh: { threshold: 0.05, 'for': '10m', severity: 'ticket' },
      // Share of DNS queries without a response. A resolver waits 5 s for each, so one in twenty is felt.
      HubbleDnsUnanswered: { threshold: 0.05, 'for': '10m', severity: 'ticket' },
      // Packets a second that encryption strict mode stopped, since they were in clear text.
      HubbleUnencryptedDropped: { threshold: 0.1, 'for': '5m', severity: 'ticket' },
      // Packets a second that XFRM stopped for want of a matching policy.
      HubbleIpsecPolicyBlocked: { threshold: 0.1, 'for': '5m', severity: 'ticket' },
      // Packets a second that XFRM refused on arrival. A rotation of the key overlaps, so none is lost by it.
      // Longer than the window of the rate: a minute of them is a node that was replaced.
      HubbleIpsecInboundErrors: { threshold: 0.1, 'for': '10m', severity: 'ticket' },
    },
  },

  signals+:: {
    hubble: {
      local c = $._config,
      local h = c.hubble,
      // A name in Kubernetes has no dot, colon or slash, which addresses, DNS names and reserved identities have.
      local name = '([a-z0-9](?:[-a-z0-9]*[a-z0-9])?)',
      local contexts = {
        namespace: name,
        pod: name + '/.*',
        identity: '(?:.*,)?k8s:io[.]kubernetes[.]pod[.]namespace=([^,]+)(?:,.*)?',
      },
      local f = {
        w: c.window,
        cluster: c.clusterLabel,
        node: c.nodeLabel,
        hubble: c.hubbleSelector,
        cilium: c.ciliumSelector,
        inference: c.inferenceNamespaces,
        quiet: anyOf(h.harmlessReasons + h.conntrackReasons + h.unencryptedReasons),
        policy: anyOf(h.policyReasons),
        harmless: anyOf(h.harmlessReasons),
        sel: c.selector,
        // Of none: what matches nothing.
        context: if c.hubbleContexts == [] then 'a^' else anyOf([contexts[name] for name in c.hubbleContexts]),
      },
      // `expr`, with the namespace of one side, `source` or `destination`, in `label`: of labelsContext, else of a context.
      local named(expr, label, side) = |||
        label_replace(
          label_replace(
            %(expr)s,
            "%(label)s", "$1$2$3", "%(side)s", "%(context)s"
          ),
          "%(label)s", "$1", "%(side)s_namespace", "(.+)"
        )
      ||| % (f { expr: std.strReplace(std.rstripChars(expr, '\n'), '\n', '\n    '), label: label, side: side }),
      // The rate of `metric` by the namespace of one side, of what names one.
      local charged(metric, matchers, side) = named(
        |||
          rate(%(metric)s{%(side)s_namespace!="", %(matchers)s}[%(w)s])
          or
          rate(%(metric)s{%(side)s_namespace="", %(side)s=~"%(context)s", %(matchers)s}[%(w)s])
        ||| % (f { metric: metric, matchers: std.join(', ', [m for m in [matchers, c.hubbleSelector] if m != '']), side: side }),
        'namespace',
        side
      ),
      local within(lines) = std.rstripChars(std.strReplace('\n' + lines, '\n', '\n  '), ' '),
      // The agent and Hubble count the same packet; where both are scraped, the one that saw more.
      local byNode(reasons) = |||
        max by (%(cluster)s, %(node)s) (
          label_replace(
            sum by (%(cluster)s, %(node)s) (rate(cilium_drop_count_total{reason=~"%(agent)s", %(cilium)s}[%(w)s])),
            "source", "agent", "", ""
          )
          or
          label_replace(
            sum by (%(cluster)s, %(node)s) (rate(hubble_drop_total{reason=~"%(reasons)s", %(hubble)s}[%(w)s])),
            "source", "hubble", "", ""
          )
        )
      ||| % (f { agent: anyOfAgents(reasons), reasons: anyOf(reasons) }),

      title: 'Hubble',
      question: 'What does Cilium drop, in which namespace and why, and does Hubble see it?',

      rules: [
        {
          // How many events a packet is that policy refuses. A node whose verdicts are events has one for each of them.
          record: 'node:hubble_policy_denial:events',
          expr: '1 + (sum by (%(cluster)s, %(node)s) (rate(hubble_flows_processed_total{type="PolicyVerdict", %(hubble)s}[%(w)s])) > bool 0)' % f,
        },
        {
          // Whose packet it was and for whom, by labelsContext, or by sourceContext and destinationContext. What policy
          // refuses counts once, whether its verdicts are events or not.
          record: 'flow_reason:hubble_drop:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, traffic_direction, sender, receiver, reason) (%%s)' % f % within(named(
            named(
              |||
                rate(hubble_drop_total{reason=~"%(policy)s", %(hubble)s}[%(w)s])
                / on (%(cluster)s, %(node)s) group_left ()
                node:hubble_policy_denial:events
                or
                rate(hubble_drop_total{%(hubble)s}[%(w)s])
              ||| % f,
              'sender',
              'source'
            ),
            'receiver',
            'destination'
          )),
        },
        {
          // A packet is missed by who sent it, and unless it was refused on its way out by the receiver too, where the
          // policy is. Of an unknown direction nobody knows which of both it is. What is within one namespace counts once.
          record: 'namespace_reason:hubble_drop:rate%(w)s' % f,
          expr: |||
            sum by (%(cluster)s, namespace, reason) (
              label_replace(
                flow_reason:hubble_drop:rate%(w)s{sender!=""} or flow_reason:hubble_drop:rate%(w)s{traffic_direction="egress"},
                "namespace", "$1", "sender", "(.*)"
              )
              or
              label_replace(
                flow_reason:hubble_drop:rate%(w)s{traffic_direction="ingress"}
                or
                flow_reason:hubble_drop:rate%(w)s{traffic_direction!~"ingress|egress", receiver!=""}
                or
                flow_reason:hubble_drop:rate%(w)s{traffic_direction!~"ingress|egress", sender=""},
                "namespace", "$1", "receiver", "(.*)"
              )
            )
          ||| % f,
        },
        { record: 'node:cilium_conntrack_drop:rate%(w)s' % f, expr: byNode(h.conntrackReasons) },
        { record: 'node:cilium_unencrypted_drop:rate%(w)s' % f, expr: byNode(h.unencryptedReasons) },
        {
          record: 'node_map:cilium_bpf_map_pressure:max',
          expr: 'max by (%(cluster)s, %(node)s, map_name) (cilium_bpf_map_pressure{map_name=~"(cilium_)?ct.*", %(cilium)s})' % f,
        },
        {
          record: 'node:hubble_flows_processed:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s) (rate(hubble_flows_processed_total{%(hubble)s}[%(w)s]))' % f,
        },
        {
          // By whom the packets were sent: an inference namespace that is not here is one that Hubble does not see.
          record: 'namespace:hubble_flows_processed:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, namespace) (%%s)' % f % within(charged('hubble_flows_processed_total', '', 'source')),
        },
        {
          // Verdicts of L3 and L4, on whose pod the policy is: the sender's on the way out, the receiver's on the way in.
          record: 'namespace_direction_action:hubble_policy_verdicts:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, namespace, direction, action) (%%s  or%%s)' % f % [
            within(charged('hubble_policy_verdicts_total', 'direction="egress"', 'source')),
            within(charged('hubble_policy_verdicts_total', 'direction!="egress"', 'destination')),
          ],
        },
        {
          record: 'node:cilium_forward_count:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s) (rate(cilium_forward_count_total{%(cilium)s}[%(w)s]))' % f,
        },
        {
          // What a slow reader of Hubble's API loses (hubble_ring_buffer) was counted before.
          record: 'node:hubble_lost_events:ratio_rate%(w)s' % f,
          expr: |||
            sum by (%(cluster)s, %(node)s) (rate(hubble_lost_events_total{source!="hubble_ring_buffer", %(hubble)s}[%(w)s]))
            /
            (
              sum by (%(cluster)s, %(node)s) (rate(hubble_lost_events_total{source!="hubble_ring_buffer", %(hubble)s}[%(w)s]))
              + node:hubble_flows_processed:rate%(w)s
            )
          ||| % f,
        },
        {
          record: 'namespace:hubble_dns_queries:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, namespace) (%%s)' % f % within(charged('hubble_dns_queries_total', 'rcode=""', 'source')),
        },
        {
          // A response goes to whoever asked.
          record: 'namespace_rcode:hubble_dns_responses:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, namespace, rcode) (%%s)' % f % within(charged('hubble_dns_responses_total', '', 'destination')),
        },
        {
          record: 'namespace:hubble_dns_errors:ratio_rate%(w)s' % f,
          expr: |||
            sum by (%(cluster)s, namespace) (
              namespace_rcode:hubble_dns_responses:rate%(w)s{rcode!~"No Error|Non-Existent Domain"}
            )
            /
            sum by (%(cluster)s, namespace) (namespace_rcode:hubble_dns_responses:rate%(w)s)
          ||| % f,
        },
        {
          // No response at all has no series, and is the worst case; but not where responses say nothing of who gets them.
          record: 'namespace:hubble_dns_unanswered:ratio_rate%(w)s' % f,
          expr: |||
            clamp_min(
              1 - (
                sum by (%(cluster)s, namespace) (namespace_rcode:hubble_dns_responses:rate%(w)s)
                or
                namespace:hubble_dns_queries:rate%(w)s * 0
                unless on (%(cluster)s)
                (
                  sum by (%(cluster)s) (rate(hubble_dns_responses_total{%(hubble)s}[%(w)s])) > 0
                  unless on (%(cluster)s)
                  namespace_rcode:hubble_dns_responses:rate%(w)s
                )
              ) / namespace:hubble_dns_queries:rate%(w)s,
              0
            )
          ||| % f,
        },
        {
          // Pods whose processes have a GPU open, within the last hour: a server that fails loses them.
          record: 'namespace:chandra_gpu_processes:max1h',
          expr: 'max by (%(cluster)s, namespace) (max_over_time(chandra_gpu_processes{namespace!="", %(sel)s}[1h]))' % f,
        },
        {
          // A packet that came encrypted and was not taken. After a rotation of the key: by a peer that has another one.
          record: 'node_error:cilium_ipsec_inbound_error:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, error) (rate(cilium_ipsec_xfrm_error{type="inbound", error=~"%(inbound)s", %(cilium)s}[%(w)s]))' % (f { inbound: anyOf(h.ipsecInboundErrors) }),
        },
        {
          // A gauge that mirrors a kernel counter: rate takes its resets for what they are.
          record: 'node:cilium_ipsec_policy_blocked:rate%(w)s' % f,
          expr: |||
            sum by (%(cluster)s, %(node)s) (
              rate(cilium_ipsec_xfrm_error{type="outbound", error="policy_blocked", %(cilium)s}[%(w)s])
            )
          ||| % f,
        },
      ],

      local useByMap = 'Use by map: ' + text.list(c, 'node_map:cilium_bpf_map_pressure:max{%s}', ['cluster', 'node'], '{{ $row.Labels.map_name }} {{ $row.Value | humanizePercentage }}') + '.',
      // The table is the reason: it is full, or a share of all packets is lost.
      local full = std.join('\n  or\n  ', [
        'max by (%(cluster)s, %(node)s) (node_map:cilium_bpf_map_pressure:max) > %(pressure)g',
        'node:cilium_conntrack_drop:rate%(w)s / node:cilium_forward_count:rate%(w)s > %(share)g',
      ]) % (f + h.HubbleConntrackFull { pressure: h.HubbleConntrackPressure.threshold }),
      // Counted, and in no namespace.
      local nameless(metric, counted, named) =
        'label_replace(\n  sum by (%s) (rate(%s[%s])) > %g\n  unless on (%s)\n  (%s),\n  "metric", "%s", "", ""\n)' %
        [c.clusterLabel, counted, c.window, h.HubbleNamespacesMissing.threshold, c.clusterLabel, named, metric],

      alerts: [
        {
          alert: 'HubbleDropsHigh',
          expr: |||
            sum by (%(cluster)s, namespace) (
              namespace_reason:hubble_drop:rate%(w)s{namespace=~"%(inference)s", reason!~"%(quiet)s"}
              or
              namespace_reason:hubble_drop:rate%(w)s{reason!~"%(quiet)s"}
              and on (%(cluster)s, namespace)
              namespace:chandra_gpu_processes:max1h > 0
            ) > %(threshold)g
          ||| % (f + h.HubbleDropsHigh),
          summary: 'Cilium drops packets of namespace {{ $labels.namespace }}.',
          description: 'Cilium drops ' + text.number('$value') + ' packets a second of namespace {{ $labels.namespace }}; by reason: ' +
                       text.list(c, 'namespace_reason:hubble_drop:rate%(w)s{%%s,reason!~"%(quiet)s"} > 0' % f, ['cluster', 'namespace'], '{{ $row.Labels.reason }} ' + text.number('$row.Value') + '/s') + '.',
        },
        {
          alert: 'HubbleConntrackFull',
          expr: |||
            node:cilium_conntrack_drop:rate%(w)s > %(threshold)g
            and on (%(cluster)s, %(node)s)
            (
              %(full)s
            )
          ||| % (f + h.HubbleConntrackFull { full: full }),
          summary: 'Cilium cannot track new connections on ' + text.node(c) + '.',
          description: 'On ' + text.node(c) + ', ' + text.number('$value') + ' packets a second are dropped because their connection cannot be entered into conntrack: new connections fail. ' + useByMap,
        },
        {
          alert: 'HubbleConntrackInsertionsFail',
          expr: |||
            node:cilium_conntrack_drop:rate%(w)s > %(threshold)g
            unless on (%(cluster)s, %(node)s)
            (
              %(full)s
            )
          ||| % (f + h.HubbleConntrackInsertionsFail { full: full }),
          summary: 'Some new connections cannot be tracked on ' + text.node(c) + '.',
          description: 'On ' + text.node(c) + ', ' + text.number('$value') + ' packets a second are dropped because their connection cannot be entered into conntrack. The map is not known to be full, and they are few: the kernel refuses an insertion into a bucket that another CPU holds. ' + useByMap,
        },
        {
          alert: 'HubbleConntrackPressure',
          expr: 'max by (%(cluster)s, %(node)s) (node_map:cilium_bpf_map_pressure:max) > %(threshold)g' % (f + h.HubbleConntrackPressure),
          summary: 'The connection tracking table of ' + text.node(c) + ' is nearly full.',
          description: 'A connection tracking map on ' + text.node(c) + ' is {{ $value | humanizePercentage }} full; once it is, live connections are thrown out and new ones fail. ' + useByMap,
        },
      ] + (if c.cilium then [{
        alert: 'HubbleMetricsMissing',
        // Each is there as soon as its endpoint is scraped, whatever metrics are enabled.
        expr: |||
          sum by (%(cluster)s) (up{%(sel)s}) > 0
          unless on (%(cluster)s)
          (
            %(any)s
          )
        ||| % (f { any: std.join('\n  or\n  ', [
          'group by (%s) (%s{%s})' % [c.clusterLabel, metric[0], metric[1]]
          for metric in [
            ['hubble_metrics_http_handler_requests_total', c.hubbleSelector],
            ['hubble_flows_processed_total', c.hubbleSelector],
            ['hubble_drop_total', c.hubbleSelector],
            ['cilium_version', c.ciliumSelector],
            ['cilium_forward_count_total', c.ciliumSelector],
          ]
        ]) }),
        summary: 'Nothing of Cilium or Hubble is scraped.',
        description: 'Chandra is scraped on {{ $value }} nodes, and neither Hubble nor the Cilium agent is on any: drops, DNS and conntrack are invisible. A ServiceMonitor without the label by which Prometheus finds its own, or metrics that are not enabled (helm-values/cilium.yaml).',
      }] else []) + [
        {
          alert: 'HubbleNamespacesMissing',
          expr: std.join('\nor\n', [
            nameless(
              'hubble_drop_total',
              'hubble_drop_total{reason!~"%(harmless)s", %(hubble)s}' % f,
              // With the labels that helm-values/cilium.yaml asks for, drops of hosts alone have no namespace either.
              '\n    namespace_reason:hubble_drop:rate%(w)s{namespace!=""}\n    or\n    hubble_drop_total{traffic_direction!="", source_pod="", destination_pod="", source_ip="", destination_ip="", %(hubble)s}\n  ' % f
            ),
            nameless('hubble_dns_queries_total', 'hubble_dns_queries_total{%(hubble)s}' % f, 'namespace:hubble_dns_queries:rate%(w)s' % f),
            nameless('hubble_dns_responses_total', 'hubble_dns_responses_total{%(hubble)s}' % f, 'namespace_rcode:hubble_dns_responses:rate%(w)s' % f),
          ]),
          summary: 'Hubble does not say whose packets it counts in {{ $labels.metric }}.',
          description: '{{ $labels.metric }} rises by ' + text.number('$value') + ' a second, and no series of it names a namespace: the alerts about namespaces are silent. Its entry in hubble.metrics.enabled needs labelsContext=source_namespace,destination_namespace,traffic_direction (helm-values/cilium.yaml).',
        },
        {
          alert: 'HubbleFlowsMissing',
          expr: |||
            node:cilium_forward_count:rate%(w)s > %(threshold)g
            unless on (%(cluster)s, %(node)s)
            node:hubble_flows_processed:rate%(w)s > 0
          ||| % (f + h.HubbleFlowsMissing),
          summary: 'Hubble exports no flows of ' + text.node(c) + '.',
          description: 'The agent on ' + text.node(c) + ' forwards ' + text.number('$value') + ' packets a second, and Hubble counts no flow there: drops, DNS and policy verdicts of this node are invisible.',
        },
        {
          alert: 'HubbleEventsLost',
          expr: 'node:hubble_lost_events:ratio_rate%(w)s > %(threshold)g' % (f + h.HubbleEventsLost),
          summary: 'Hubble loses events on ' + text.node(c) + '.',
          description: 'Hubble on ' + text.node(c) + ' loses {{ $value | humanizePercentage }} of its events before they are counted: its metrics are too low.',
        },
        {
          alert: 'HubbleDnsErrorsHigh',
          expr: 'namespace:hubble_dns_errors:ratio_rate%(w)s > %(threshold)g' % (f + h.HubbleDnsErrorsHigh),
          summary: 'DNS fails for namespace {{ $labels.namespace }}.',
          description: '{{ $value | humanizePercentage }} of the DNS responses to namespace {{ $labels.namespace }} are errors; by code: ' +
                       text.list(c, 'namespace_rcode:hubble_dns_responses:rate%(w)s{%%s,rcode!~"No Error|Non-Existent Domain"} > 0' % f, ['cluster', 'namespace'], '{{ $row.Labels.rcode }} ' + text.number('$row.Value') + '/s') + '.',
        },
        {
          alert: 'HubbleDnsUnanswered',
          expr: 'namespace:hubble_dns_unanswered:ratio_rate%(w)s > %(threshold)g' % (f + h.HubbleDnsUnanswered),
          summary: 'DNS queries of namespace {{ $labels.namespace }} stay unanswered.',
          description: '{{ $value | humanizePercentage }} of the DNS queries of namespace {{ $labels.namespace }} get no response; a resolver waits 5 s for each before it asks again.',
        },
        {
          alert: 'HubbleUnencryptedDropped',
          expr: 'node:cilium_unencrypted_drop:rate%(w)s > %(threshold)g' % (f + h.HubbleUnencryptedDropped),
          summary: 'Encryption strict mode drops traffic on ' + text.node(c) + '.',
          description: 'On ' + text.node(c) + ', ' + text.number('$value') + ' packets a second are dropped because they are not encrypted.',
        },
        {
          alert: 'HubbleIpsecPolicyBlocked',
          expr: 'node:cilium_ipsec_policy_blocked:rate%(w)s > %(threshold)g' % (f + h.HubbleIpsecPolicyBlocked),
          summary: 'IPsec stops packets on ' + text.node(c) + '.',
          description: 'On ' + text.node(c) + ', ' + text.number('$value') + ' packets a second match no IPsec policy and are stopped: traffic to at least one node fails.',
        },
        {
          alert: 'HubbleIpsecInboundErrors',
          expr: 'sum by (%(cluster)s, %(node)s) (node_error:cilium_ipsec_inbound_error:rate%(w)s) > %(threshold)g' % (f + h.HubbleIpsecInboundErrors),
          summary: 'IPsec refuses packets that reach ' + text.node(c) + '.',
          description: 'On ' + text.node(c) + ', ' + text.number('$value') + ' packets a second arrive encrypted and are refused: at least one peer uses a key or a policy that this node has not. By error: ' +
                       text.list(c, 'node_error:cilium_ipsec_inbound_error:rate%(w)s{%%s} > 0' % f, ['cluster', 'node'], '{{ $row.Labels.error }} ' + text.number('$row.Value') + '/s') + '.',
        },
      ],

      local where = panels.where(c, ['cluster', 'namespace']),
      local whereNode = panels.where(c, ['cluster', 'node']),

      first:: panels.barchart(
        'Hubble drop reasons by namespace',
        'Packets a second that Cilium drops now, by namespace and reason. An inference namespace should show none: POLICY_DENIED is a policy that is too tight, CT_MAP_INSERTION_FAILED a full connection tracking table. A refused packet counts once, where hubble_drop_total also counts its policy verdict. Runbook: HubbleDropsHigh.',
        'topk(50, sum by (namespace, reason) (namespace_reason:hubble_drop:rate%(w)s{%(where)s} > 0))' % (f { where: where }),
        panels.perSecond,
        'namespace',
        'reason',
        [panels.above(h.HubbleDropsHigh.threshold)],
      ),

      panels: [
        $.signals.hubble.first { w: 24 },
      ] + [
        panels.timeseries(
          'Drops by namespace and reason',
          'The same over time. When did it begin, and what was rolled out then? `hubble observe --verdict DROPPED` names the peers.',
          [{ expr: 'topk(20, sum by (namespace, reason) (namespace_reason:hubble_drop:rate%(w)s{%(where)s} > 0))' % (f { where: where }), legend: '{{namespace}} {{reason}}' }],
          panels.perSecond,
        ),
        panels.timeseries(
          'What policy refuses or would refuse',
          'Policy verdicts a second that are not "forwarded", by the namespace whose policy it is. "audit" is what audit mode lets through. Hubble has the policy\'s name in its flows only: `hubble observe --type policy-verdict`. Runbook: HubbleDropsHigh.',
          [{ expr: 'topk(20, sum by (namespace, direction, action) (namespace_direction_action:hubble_policy_verdicts:rate%(w)s{action!~"forwarded|redirected", %(where)s} > 0))' % (f { where: where }), legend: '{{namespace}} {{direction}} {{action}}' }],
          panels.perSecond,
        ),
        panels.timeseries(
          'Chatty pods, by port',
          'Flow events a second by sender and the port that it talks to; replies and what is dropped are not counted. Cilium aggregates them: an event per connection every 5 s and for each TCP flag, whatever the bytes. A pod or a port that nobody expects is the one to ask about.',
          [{ expr: 'topk(20, sum by (source_namespace, source_pod, protocol, port) (rate(hubble_port_distribution_total{source_namespace=~"$namespace", source_pod=~"$pod", %(where)s}[%(w)s])) > 0)' % (f { where: panels.where(c, ['cluster']) }), legend: '{{source_namespace}}/{{source_pod}} {{protocol}} {{port}}' }],
          'ops',
        ),
        panels.timeseries(
          'Connection tracking map in use',
          'Above the line a burst of connections fills the map, and then new connections fail. Raise bpf.ctTcpMax and bpf.ctAnyMax, or find who opens so many.',
          [{ expr: 'topk(10, node_map:cilium_bpf_map_pressure:max{%s})' % whereNode, legend: '{{%(node)s}} {{map_name}}' % f }],
          'percentunit',
          [panels.above(h.HubbleConntrackPressure.threshold)],
        ),
        panels.timeseries(
          'DNS queries without a response',
          'Share of queries that nobody answers. Each costs the application a resolver timeout of 5 s.',
          [{ expr: 'topk(10, namespace:hubble_dns_unanswered:ratio_rate%(w)s{%(where)s})' % (f { where: where }), legend: '{{namespace}}' }],
          'percentunit',
          [panels.above(h.HubbleDnsUnanswered.threshold)],
        ),
        panels.timeseries(
          'DNS errors',
          'Share of responses that are errors, names that do not exist aside. Hubble measures no DNS latency.',
          [{ expr: 'topk(10, namespace:hubble_dns_errors:ratio_rate%(w)s{%(where)s})' % (f { where: where }), legend: '{{namespace}}' }],
          'percentunit',
          [panels.above(h.HubbleDnsErrorsHigh.threshold)],
        ),
        panels.timeseries(
          'Flows that Hubble counts',
          'A node at zero that forwards packets is invisible to every panel above.',
          [{ expr: 'node:hubble_flows_processed:rate%(w)s{%(where)s}' % (f { where: whereNode }), legend: '{{%(node)s}}' % f }],
          'ops',
        ),
        panels.timeseries(
          'Flows that Hubble counts, by namespace',
          'By who sends. A namespace with running pods and no line is invisible to every panel above: pods in the host\'s network, or flow without labelsContext.',
          [{ expr: 'topk(20, namespace:hubble_flows_processed:rate%(w)s{%(where)s})' % (f { where: where }), legend: '{{namespace}}' }],
          'ops',
        ),
        panels.timeseries(
          'Events that Hubble lost',
          'Share of events lost before they were counted. Above the line the counters are too low to compare.',
          [{ expr: 'topk(10, node:hubble_lost_events:ratio_rate%(w)s{%(where)s})' % (f { where: whereNode }), legend: '{{%(node)s}}' % f }],
          'percentunit',
          [panels.above(h.HubbleEventsLost.threshold)],
        ) + panels.wide,
      ],
    },
  },
}
