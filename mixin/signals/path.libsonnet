// The path of a request, leg by leg on one time axis: which one became slow when the request did? No exporter half: how long
// requests take is told by the server itself or by a gateway's instrumentation, the legs by the other signals.
local panels = import '../lib/panels.libsonnet';

{
  _config+:: {
    path: {
      // Whose histograms tell how long requests take. `vllm`: vLLM's own. `http`: OpenTelemetry eBPF instrumentation's, for
      // gateways and for servers that tell nothing themselves (helm-values/opentelemetry-ebpf-instrumentation.yaml).
      requests: ['vllm', 'http'],
    },
  },

  signals+:: {
    path: {
      local c = $._config,
      local f = { w: c.window, cluster: c.clusterLabel, node: c.nodeLabel },

      // `labels` are those that name the pod. vLLM's pods are targets, and have the names that the operator's monitors give
      // to targets; the instrumentation tells of other pods than its own.
      local target = ['namespace', 'pod'],
      local known = {
        vllm: [
          { measure: 'request', metric: 'vllm:e2e_request_latency_seconds', labels: target, sel: c.vllmSelector },
          { measure: 'first token', metric: 'vllm:time_to_first_token_seconds', labels: target, sel: c.vllmSelector },
        ],
        http: [
          { measure: 'HTTP', metric: 'http_server_request_duration_seconds', labels: ['k8s_namespace_name', 'k8s_pod_name'], sel: c.httpSelector },
        ],
      },
      local measures = std.flattenArrays([
        if std.objectHas(known, source) then known[source] else error '_config.path.requests: ' + source + ' is none of ' + std.join(', ', std.objectFields(known))
        for source in c.path.requests
      ]),
      // Of several measures, by pod and measure.
      local rates(measures, suffix, le) =
        local one(m) =
          local sum = 'sum by (%(cluster)s, %(own)s%(le)s) (rate(%(metric)s_%(suffix)s{%(sel)s}[%(w)s]))' % (f + m { own: std.join(', ', m.labels), le: le, suffix: suffix });
          local named = std.foldl(
            function(expr, i) if m.labels[i] == target[i] then expr else 'label_replace(%s, "%s", "$1", "%s", "(.*)")' % [expr, target[i], m.labels[i]],
            [0, 1],
            sum,
          );
          'label_replace(%s, "measure", "%s", "", "")' % [named, m.measure];
        'sum by (%(cluster)s, namespace, pod, measure%(le)s) (\n  %(all)s\n)' % (f { le: le, all: std.join('\n  or\n  ', std.map(one, measures)) }),

      title: 'Path of a request',
      question: 'Which leg of its way makes a request slow?',

      rules: [
        { record: 'pod_measure:request_seconds:p95_rate%(w)s' % f, expr: 'histogram_quantile(0.95, %s)' % rates(measures, 'bucket', ', le') },
        { record: 'pod_measure:requests:rate%(w)s' % f, expr: rates(std.filter(function(m) m.measure != 'first token', measures), 'count', '') },
      ],

      alerts: [],

      others: c.grafana.others,

      local pod = panels.where(c, ['cluster', 'node', 'namespace', 'pod']),
      // Neither the server nor its gateway is told from other pods by its node.
      local request = panels.where(c, ['cluster', 'namespace', 'pod']),
      local namespace = panels.where(c, ['cluster', 'namespace']),
      local p = f { pod: pod, request: request, namespace: namespace },
      local legend = '{{namespace}} {{pod}} {{%(node)s}}' % f,
      local runbook(alert) =
        local place = c.runbookURL % ('%s.md#%s' % [signals[alert], std.asciiLower(alert)]);
        // A link to a path would lead into Grafana.
        (if std.length(std.findSubstr('://', place)) > 0 then '[%s](%s)' else '%s (`%s`)') % [alert, place],
      local signals = { [alert.alert]: s for s in std.objectFields($.signals) for alert in $.signals[s].alerts },
      local leg(title, rise, alerts, queries, unit, thresholds=[]) =
        panels.timeseries(
          title,
          rise + (if alerts == [] then '' else ' Runbook: %s.' % std.join(', ', std.map(runbook, alerts))),
          queries,
          unit,
          thresholds,
        ) + panels.leg,

      panels: [
        leg(
          'Requests: how long, p95',
          'What the user feels; below, leg by leg, what it may come from. A rise here and in no leg below: the model itself, its batch or its queue. `first token` rises alone when requests wait before they run.',
          [],
          [{ expr: 'topk(10, pod_measure:request_seconds:p95_rate%(w)s{%(request)s})' % p, legend: '{{namespace}} {{pod}} {{measure}}' }],
          's',
        ),
        leg(
          'Requests: how many',
          'A rise here explains one above: more load, not a slower path. A fall after a rise above: clients give up.',
          [],
          [{ expr: 'topk(10, pod_measure:requests:rate%(w)s{%(request)s})' % p, legend: '{{namespace}} {{pod}} {{measure}}' }],
          panels.perSecond,
        ),
        leg(
          'CPU → GPU: threads that drive a GPU wait for a CPU, p99',
          'A rise: the GPU runs dry since its threads do not get a CPU: a CPU limit that throttles, or another pod on its cores.',
          ['GpuRunqueueDelayHigh'],
          [{ expr: 'topk(10, pod:chandra_gpu_runqueue_delay_seconds:p99_rate%(w)s{%(pod)s})' % p, legend: legend }],
          's',
          [panels.above(c.gpu.GpuRunqueueDelayHigh.threshold)],
        ),
        leg(
          'GPU ↔ GPU: ranks wait for the last one, p99',
          'A rise: one rank comes late to the collectives, and all others wait. With the row above: for want of a CPU. With queue pairs or retransmits below: for its network. Alone: its data or its GPU.',
          ['NcclStraggler', 'NcclCollectiveStuck'],
          [{ expr: 'topk(10, max by (%(cluster)s, %(node)s, namespace, pod) (pod_operation_source:chandra_nccl_arrival_wait_seconds:p99_rate%(w)s{%(pod)s}))' % p, legend: legend }],
          's',
        ) + panels.atLeast(0.01),
        leg(
          'RDMA: queue pairs created and destroyed',
          'Any during a run: connections are torn down and rebuilt, since workers die or NCCL starts over.',
          ['RdmaQueuePairSpike', 'RdmaQueuePairChurn', 'RdmaQueuePairErrors'],
          [
            { expr: 'topk(5, pod:chandra_rdma_queue_pairs_created:rate%(w)s{%(pod)s})' % p, legend: legend + ' created' },
            { expr: 'topk(5, pod:chandra_rdma_queue_pairs_destroyed:rate%(w)s{%(pod)s})' % p, legend: legend + ' destroyed' },
          ],
          panels.perSecond,
        ) + panels.atLeast(0.05),
        leg(
          'TCP: segments sent again',
          'A rise: packets are lost or late between this pod and its peers. With encryption below: they wait for handshakes. With drops below: Cilium drops them. Alone: link, NIC or switch.',
          ['TcpRetransmitsHigh'],
          [{ expr: 'topk(10, pod:chandra_tcp_retransmits:rate%(w)s{%(pod)s})' % p, legend: legend }],
          panels.perSecond,
          [panels.above(c.tcp.TcpRetransmitsHigh.threshold)],
        ),
        leg(
          'Encryption: CPU',
          'A rise with the traffic is its price; one without more traffic, small packets, or rebuilt sessions: the row below.',
          ['EncryptionCpuHigh'],
          [{ expr: 'topk(10, pod:chandra_encryption_cpu_seconds:rate%(w)s{%(pod)s})' % p, legend: legend }],
          panels.cores,
          [panels.above(c.encryption.EncryptionCpuHigh.threshold)],
        ),
        leg(
          'Encryption: sessions a minute with one peer',
          "On the nodes where these pods' traffic is encrypted. Half a session a minute is normal. Red: the encryption context is rebuilt all the time, and packets wait for each handshake.",
          ['EncryptionRekeyStorm'],
          [{
            expr: 'topk(10, interface:chandra_encryption_peer_sessions:max_rate%(w)s * 60 and on (%(cluster)s, %(node)s) pod:chandra_encryption_bytes:rate%(w)s{%(pod)s})' % p,
            legend: '{{%(node)s}} {{interface}}' % f,
          }],
          'short',
          [panels.above(c.encryption.EncryptionRekeyStorm.threshold)],
        ) + panels.colouredByThreshold,
        leg(
          'Cilium: packets dropped',
          'Of the whole namespace. POLICY_DENIED: a policy that is too tight. CT_MAP_INSERTION_FAILED: the connection tracking table is full.',
          ['HubbleDropsHigh', 'HubbleConntrackFull'],
          [{ expr: 'topk(10, sum by (namespace, reason) (namespace_reason:hubble_drop:rate%(w)s{%(namespace)s}))' % p, legend: '{{namespace}} {{reason}}' }],
          panels.perSecond,
          [panels.above(c.hubble.HubbleDropsHigh.threshold)],
        ),
        leg(
          'DNS: queries that fail',
          'Of the whole namespace, the share without a response (each costs 5 s) and with an error. A rise: calls by name wait before the first packet.',
          ['HubbleDnsUnanswered', 'HubbleDnsErrorsHigh'],
          [
            { expr: 'topk(5, namespace:hubble_dns_unanswered:ratio_rate%(w)s{%(namespace)s})' % p, legend: '{{namespace}} unanswered' },
            { expr: 'topk(5, namespace:hubble_dns_errors:ratio_rate%(w)s{%(namespace)s})' % p, legend: '{{namespace}} errors' },
          ],
          'percentunit',
          [panels.above(c.hubble.HubbleDnsUnanswered.threshold)],
        ),
      ],
    },
  },
}
