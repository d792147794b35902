// SPDX-License-Identifier: Apache-2.0
// The data set: a cluster of three nodes, and what happens in it when. Raw series only, with the names and labels of the
// exporter's golden pages (exporter/tests/golden) and of Hubble, the Cilium agent, node_exporter, vLLM and OpenTelemetry
// eBPF instrumentation.
import { createWriteStream } from 'node:fs';

// What may go wrong.
export const INCIDENTS = {
  crash: 'a worker of the training job crashes in a loop: queue pairs are torn down and rebuilt',
  contention: 'a batch job takes the cores beside llama-worker-2: its GPU threads wait, it comes last, the exporter loses events',
  policy: 'a policy that is too tight in namespace batch',
  resolver: 'a resolver is overloaded: DNS queries of training stay unanswered',
  storm:
    'the rekey storm: a tool on gpu-1 removes the WireGuard peer of gpu-2 and adds it again every 5 s. Both ends derive sessions all the time, packets that waited are sent again, requests take longer',
};

const minute = (minute) => 3600 + 60 * minute;

// Two hours, the same bytes each time. The last hour is what dashboards show. From which of its minutes until which:
const MINUTES = { crash: [5, 15], contention: [12, 27], policy: [20, 60], resolver: [30, 37], storm: [38, 60] };
export const fixed = { start: Date.UTC(2026, 0, 15, 8) / 1000, step: 15, steps: (2 * 3600) / 15 };
export const script = (incident, t) => {
  const [from, until] = MINUTES[incident].map(minute);
  return t >= from && t < until ? t - from : -1;
};

// A number of [0, 1) that is always the same for the same key and step.
function noise(key, i) {
  let h = 2166136261 ^ i;
  for (const c of key) h = Math.imul(h ^ c.charCodeAt(0), 16777619);
  h ^= h >>> 15;
  h = Math.imul(h, 2246822507);
  h ^= h >>> 13;
  h = Math.imul(h, 3266489909);
  return ((h ^ (h >>> 16)) >>> 0) / 4294967296;
}
// Slow waves and a little jitter around 1.
function load(key, i, jitter = 0.15) {
  const phase = 6.3 * noise(key, -1);
  return 1 + 0.12 * Math.sin(i / 37 + phase) + 0.06 * Math.sin(i / 11 + 2 * phase) + jitter * (noise(key, i) - 0.5);
}

// The normal distribution, to three digits.
function below(z) {
  if (z === Infinity) return 1;
  return 1 / (1 + Math.exp(-1.5976 * z - 0.07056 * z ** 3));
}

// All series, by family: each with `at(i)`, its value at the i-th step, to be asked of one step after the other.
// `since(incident, t)` says for how many seconds an incident lasts at `t`, seconds from the first step; less than 0: it does not.
export function cluster(step, since) {
  const is = (incident) => (t) => since(incident, t) >= 0;
  const [crash, contention, policy, resolver, storm] = Object.keys(INCIDENTS).map(is);

  const families = new Map();
  const text = (labels) => Object.entries(labels).map(([name, value]) => `${name}="${value}"`).join(',');
  function series(family, type, name, labels, at) {
    if (!families.has(family)) families.set(family, { type, series: [] });
    families.get(family).series.push({ name, labels: text(labels), at });
  }

  const gauge = (name, labels, at) => series(name, 'gauge', name, labels, (i) => at(i * step, i));

  // A counter by its rate a second.
  // What is compared with another counter has the `key` of that one, for the same jitter.
  function counter(name, labels, rate, whole = true, key = name + text(labels)) {
    let sum = 0;
    let kept = 0;
    series(name.replace(/_total$/, ''), 'counter', name, labels, (i) => {
      sum += Math.max(0, rate(i * step, i)) * step * load(key, i);
      kept = whole ? Math.max(kept, Math.floor(sum + noise(key, 7))) : sum;
      return kept;
    });
  }

  // A histogram by the rate of its observations and the median of each moment; they scatter by a factor of e^spread.
  function histogram(name, labels, bounds, rate, median, spread = 0.6) {
    const key = name + text(labels);
    const counts = new Array(bounds.length + 1).fill(0);
    let sum = 0;
    let now = -1;
    const row = (i) => {
      if (i === now) return counts;
      now = i;
      const t = i * step;
      const n = Math.max(0, rate(t, i)) * step * load(key, i);
      const middle = median(t, i) * load(key + 'm', i, 0.1);
      sum += n * middle * Math.exp((spread * spread) / 2);
      [...bounds, Infinity].forEach((bound, b) => (counts[b] += n * below(Math.log(bound / middle) / spread)));
      return counts;
    };
    [...bounds, '+Inf'].forEach((bound, b) => series(name, 'histogram', `${name}_bucket`, { ...labels, le: bound }, (i) => row(i)[b]));
    series(name, 'histogram', `${name}_sum`, labels, (i) => (row(i), sum));
    series(name, 'histogram', `${name}_count`, labels, (i) => row(i).at(-1));
  }

  const byFour = (from, n) => Array.from({ length: n }, (_, i) => +(from * 4 ** i).toPrecision(7));
  const SECONDS = byFour(0.000016, 11);
  const INTERVALS = byFour(0.25, 8);

  // --- the cluster ---------------------------------------------------------------------------------------------------

  const NODES = ['gpu-1', 'gpu-2', 'gpu-3'];
  const chandra = (node, labels = {}) => ({ job: 'chandra', instance: `${node}:9970`, node, ...labels });
  const hubble = (node, labels = {}) => ({ job: 'hubble-metrics', instance: `${node}:9965`, node, ...labels });
  const agent = (node, labels = {}) => ({ job: 'cilium-agent', instance: `${node}:9962`, node, ...labels });
  const host = (node, labels = {}) => ({ job: 'node-exporter', instance: `${node}:9100`, ...labels });

  const pod = (node, namespace, name, container, more = {}) => ({ node, name, labels: { namespace, pod: name, container }, ...more });
  const models = [pod('gpu-1', 'inference', 'vllm-0', 'engine', { bytes: 180e6 }), pod('gpu-2', 'inference', 'vllm-1', 'engine', { bytes: 170e6 })];
  const gateway = pod('gpu-2', 'inference', 'gateway', 'proxy', { bytes: 60e6 });
  const workers = [0, 1, 2, 3].map((rank) => pod(rank < 2 ? 'gpu-2' : 'gpu-3', 'training', `llama-worker-${rank}`, 'worker', { rank, bytes: 25e6 }));
  // Two jobs with ranks: the training, and the model that two pods serve together.
  const ranked = [...workers, ...models.map((p, i) => Object.assign(p, { serves: i }))];
  const others = [
    pod('gpu-1', 'batch', 'tokenizer-7c9d', 'main', { bytes: 8e6 }),
    pod('gpu-3', 'batch', 'preprocess-x2k4', 'main', { bytes: 12e6 }),
    pod('gpu-3', 'render', 'denoiser-0', 'main', { bytes: 3e6 }),
    pod('gpu-1', 'kube-system', 'coredns-5d78', 'coredns', { bytes: 0.4e6 }),
    pod('gpu-2', 'monitoring', 'prometheus-0', 'prometheus', { bytes: 5e6 }),
  ];
  const pods = [...models, gateway, ...workers, ...others];
  // The two ends of the tunnel that is rebuilt, and who sends through it.
  const rebuilt = (node) => node !== 'gpu-3';
  const through = (p) => p.labels.namespace === 'inference';

  // --- tcp -----------------------------------------------------------------------------------------------------------

  const retransmits = {
    syn: () => 0.01,
    synack: () => 0.005,
    rto: (p, t) => (through(p) && storm(t) ? 3.4 : 0.02),
    fast: (p, t) => (through(p) && storm(t) ? 5.2 * (p === gateway ? 1.6 : 1) : p.rank === 2 && contention(t) ? 1.2 : 0.15),
    probe: (p, t) => (through(p) && storm(t) ? 2 : 0.08),
  };
  for (const [kind, rate] of Object.entries(retransmits)) {
    for (const p of pods) counter('chandra_tcp_retransmits_total', chandra(p.node, { ...p.labels, kind }), (t) => rate(p, t));
    for (const node of NODES)
      for (const name of ['', 'unknown'])
        counter('chandra_tcp_retransmits_total', chandra(node, { namespace: '', pod: name, container: '', kind }), () => (name ? 0 : 0.03));
  }

  // --- rdma ----------------------------------------------------------------------------------------------------------

  const PAIRS = 16;
  const ranks = (node) => ranked.filter((p) => p.node === node);
  for (const node of NODES) {
    const device = { device: 'mlx5_0' };
    const rebuilds = (t) => (node === 'gpu-3' && crash(t) ? (2 * PAIRS) / 60 : 0);
    // From the first rebuild on, a pair is destroyed before the next is created.
    counter('chandra_rdma_device_queue_pairs_created_total', chandra(node, device), rebuilds);
    counter('chandra_rdma_device_queue_pairs_destroyed_total', chandra(node, device), rebuilds);
    gauge('chandra_rdma_enumeration_age_seconds', chandra(node, device), (t, i) => 4 + 5 * noise(node, i));
    for (const [type, n] of [['SMI', 1], ['GSI', 1]])
      gauge('chandra_rdma_queue_pairs', chandra(node, { namespace: '', pod: '', container: '', ...device, type, state: 'RTS' }), () => n);
    for (const p of ranks(node)) {
      const crashes = (t) => p.rank === 2 && crash(t);
      const down = (t) => crashes(t) && Math.floor(t / 30) % 2 === 0;
      for (const state of ['INIT', 'RTR', 'RTS'])
        gauge('chandra_rdma_queue_pairs', chandra(node, { ...p.labels, ...device, type: 'RC', state }), (t) =>
          state === 'RTS' ? (down(t) ? 0 : PAIRS) : crashes(t) && !down(t) && state === 'INIT' ? 3 : 0,
        );
      const rate = (t) => (crashes(t) ? PAIRS / 60 : 0.002);
      counter('chandra_rdma_queue_pairs_created_total', chandra(node, p.labels), rate);
      counter('chandra_rdma_queue_pairs_destroyed_total', chandra(node, p.labels), rate);
      histogram('chandra_rdma_queue_pair_lifetime_seconds', chandra(node, p.labels), byFour(0.25, 10), rate, (t) => (crashes(t) ? 50 : 5400));
      histogram('chandra_rdma_queue_pair_connect_seconds', chandra(node, p.labels), SECONDS, rate, (t) => (crashes(t) ? 0.09 : 0.012));
      for (const phase of ['address', 'route'])
        histogram(`chandra_rdma_${phase}_resolution_seconds`, chandra(node, { ...p.labels, result: 'ok' }), SECONDS, rate, (t) => (crashes(t) ? 0.06 : phase === 'route' ? 0.004 : 0.001));
      for (const event of ['communication_established', 'last_wqe_reached', 'fatal'])
        counter('chandra_rdma_queue_pair_events_total', chandra(node, { ...p.labels, event }), (t) => (event === 'fatal' ? 0 : rate(t)));
      for (const kind of ['user', 'dmabuf'])
        counter('chandra_rdma_memory_registered_bytes_total', chandra(node, { ...p.labels, kind }), (t) => (crashes(t) ? 60e6 : 0.4e6));
    }
  }

  // --- gpu -----------------------------------------------------------------------------------------------------------

  for (const p of [...models, ...workers, others[2]]) {
    const waits = (t) => p.rank === 2 && contention(t);
    const amd = p.labels.namespace === 'render';
    for (const gpu of amd ? [''] : [...'01234567'])
      gauge('chandra_gpu_processes', chandra(p.node, { ...p.labels, driver: amd ? 'drm' : 'nvidia', gpu }), (t) => (p.rank === 2 && crash(t) && Math.floor(t / 30) % 2 === 0 ? 0 : 1));
    histogram('chandra_gpu_runqueue_delay_seconds', chandra(p.node, p.labels), SECONDS, (t) => (waits(t) ? 300 : 900), (t) => (waits(t) ? 0.009 : 0.00009), 1.1);
    if (amd) {
      const ring = { device: '0000:c3:00.0', ring: 'gfx_0.0.0' };
      histogram('chandra_gpu_job_queue_seconds', chandra(p.node, { ...p.labels, ...ring }), SECONDS, () => 60, () => 0.0004);
      histogram('chandra_gpu_job_run_seconds', chandra(p.node, { ...p.labels, ...ring }), SECONDS, () => 60, () => 0.011);
    } else if (p.rank === 2 || p === models[0]) {
      for (const call of ['launch', 'stream_synchronize', 'memcpy']) {
        const usual = { launch: 0.000006, stream_synchronize: 0.0021, memcpy: 0.00012 }[call];
        histogram('chandra_cuda_call_seconds', chandra(p.node, { ...p.labels, call }), SECONDS, () => 40, (t) => usual + (waits(t) ? 0.009 : 0));
        histogram('chandra_cuda_call_preempted_seconds', chandra(p.node, { ...p.labels, call }), SECONDS, () => 40, (t) => (waits(t) ? 0.009 : 0.000004));
      }
    }
  }

  // --- nccl ----------------------------------------------------------------------------------------------------------

  for (const p of ranked) {
    const communicator = p.serves === undefined ? '9c4f1e20a7d35b68' : '51b0c6f2e98d7a34';
    const late = (t) => p.serves === undefined && contention(t);
    // Packets that wait for a handshake make the collective longer, for all ranks.
    const taken = (t) => 0.0031 + (late(t) && !straggles(t) ? 0.021 : 0) + (p.serves !== undefined && storm(t) ? 0.012 : 0);
    const straggles = (t) => p.rank === 2 && late(t);
    const beside = p.node === 'gpu-3';
    for (const source of ['host', 'kernel']) {
      const rank = { ...p.labels, communicator, rank: p.rank ?? p.serves, source };
      // Each node tells of its own ranks: those of gpu-2 arrive together all the time.
      const waited = (t) => (late(t) && beside ? (p.rank === 2 ? 0.00005 : 0.021) : 0.00018);
      counter('chandra_nccl_rank_collectives_total', chandra(p.node, rank), () => 24, false, communicator);
      counter('chandra_nccl_rank_wait_seconds_total', chandra(p.node, rank), (t) => 24 * waited(t), false, communicator);
      counter('chandra_nccl_rank_last_arrivals_total', chandra(p.node, rank), (t) => 24 * (late(t) && beside ? (p.rank === 2 ? 0.97 : 0.03) : 0.5), false, communicator);
      for (const operation of ['all_reduce', 'all_gather'])
        histogram('chandra_nccl_arrival_wait_seconds', chandra(p.node, { ...p.labels, operation, source }), SECONDS, () => 12, (t) => waited(t));
    }
    counter('chandra_nccl_rank_collective_seconds_total', chandra(p.node, { ...p.labels, communicator, rank: p.rank ?? p.serves }), (t) => 24 * taken(t), false);
    for (const operation of ['all_reduce', 'all_gather']) {
      histogram('chandra_nccl_collective_seconds', chandra(p.node, { ...p.labels, operation, source: 'kernel' }), SECONDS, () => 12, taken);
      histogram('chandra_nccl_enqueue_seconds', chandra(p.node, { ...p.labels, operation }), SECONDS, () => 12, (t) => (straggles(t) ? 0.0004 : 0.00003));
    }
    const pending = (t, i) => (crash(t) && p.serves === undefined ? since('crash', t) % 60 : 0.02 + 0.03 * noise(p.name, i));
    gauge('chandra_nccl_oldest_pending_seconds', chandra(p.node, p.labels), pending);
    gauge('chandra_nccl_communicator_pending_seconds', chandra(p.node, { ...p.labels, communicator }), pending);
    if (p.rank === 2)
      gauge('chandra_nccl_missing_rank_seconds', chandra(p.node, { ...p.labels, communicator, rank: p.rank, state: 'gone' }), (t, i) => (crash(t) && pending(t, i) > 10 ? pending(t, i) : 0));
    for (const [phase, seconds] of [['rendezvous', 6], ['allocate', 0.8], ['transports', 3], ['total', 11]])
      histogram('chandra_nccl_init_seconds', chandra(p.node, { ...p.labels, phase }), byFour(0.25, 8), (t) => (crash(t) && p.serves === undefined ? 2 / 60 : t < 600 ? 1 / 300 : 0), () => seconds);
  }

  // --- encryption ------------------------------------------------------------------------------------------------------

  for (const p of pods) {
    for (const direction of ['encrypt', 'decrypt']) {
      const labels = { namespace: p.labels.namespace, pod: p.name, container: '', protocol: 'wireguard', direction };
      const bytes = (t) => p.bytes * (direction === 'encrypt' ? 1 : 0.7) * (through(p) && storm(t) ? 0.93 : 1);
      counter('chandra_encryption_bytes_total', chandra(p.node, labels), bytes);
      counter('chandra_encryption_packets_total', chandra(p.node, labels), (t) => bytes(t) / (through(p) && storm(t) ? 900 : 1300));
      counter('chandra_encryption_cpu_seconds_total', chandra(p.node, labels), (t) => bytes(t) * 1.1e-9 * (through(p) && storm(t) ? 2.1 : 1), false);
    }
  }
  for (const node of NODES) {
    const tunnel = { protocol: 'wireguard', interface: 'cilium_wg0' };
    const key = { 'gpu-1': 'QXQXysKN', 'gpu-2': 'hV3mZt0c', 'gpu-3': 'r8Yd1LbP' };
    const peers = NODES.filter((peer) => peer !== node);
    // Every two minutes; in the storm one handshake for each time that the peer comes back.
    const often = (peer) => (t) => (storm(t) && rebuilt(node) && rebuilt(peer) ? 1 / 5.2 : 1 / 120);
    const all = (t) => peers.reduce((sum, peer) => sum + often(peer)(t), 0);
    for (const peer of peers) counter('chandra_encryption_peer_sessions_total', chandra(node, { ...tunnel, peer: key[peer] }), often(peer));
    counter('chandra_encryption_sessions_total', chandra(node, tunnel), all);
    histogram('chandra_encryption_session_interval_seconds', chandra(node, tunnel), INTERVALS, all, (t) => (storm(t) && rebuilt(node) ? 5.2 : 120), 0.2);
    for (const event of ['initiated', 'completed', 'expired'])
      counter('chandra_encryption_handshakes_total', chandra(node, { ...tunnel, event }), (t) => (event === 'expired' ? (storm(t) && rebuilt(node) ? 0.01 : 0.0004) : all(t) * (event === 'initiated' ? 1.1 : 1)));
    for (const [mode, cores] of [['system', 1.7], ['softirq', 0.9]])
      for (const cpu of [0, 1])
        counter('node_cpu_seconds_total', host(node, { cpu, mode }), (t) => (cores + (mode === 'softirq' && storm(t) && rebuilt(node) ? 0.5 : 0)) / 2, false);
    gauge('node_uname_info', host(node, { nodename: node, sysname: 'Linux', release: '6.12.57', version: '#1 SMP', machine: 'x86_64', domainname: '(none)' }), () => 1);
  }

  // --- hubble and the agent --------------------------------------------------------------------------------------------

  const NAMESPACES = ['inference', 'training', 'batch', 'render', 'monitoring'];
  for (const node of NODES) {
    const drop = (reason, namespace, traffic_direction, rate) =>
      counter(
        'hubble_drop_total',
        hubble(node, { reason, protocol: 'TCP', source_namespace: traffic_direction === 'egress' ? namespace : 'kube-system', destination_namespace: traffic_direction === 'egress' ? '' : namespace, traffic_direction }),
        rate,
      );
    // With policy verdict events, as they are by default: a refused packet is a drop and a verdict, and both are counted.
    const refuse = (namespace, direction, rate) => {
      drop('POLICY_DENIED', namespace, direction, (t) => 2 * rate(t));
      const [source_namespace, destination_namespace] = direction === 'egress' ? [namespace, ''] : ['kube-system', namespace];
      counter('hubble_policy_verdicts_total', hubble(node, { direction, match: 'none', action: 'dropped', source_namespace, destination_namespace }), rate);
      counter('hubble_flows_processed_total', hubble(node, { protocol: 'TCP', type: 'PolicyVerdict', subtype: '', verdict: 'DROPPED', source_namespace, destination_namespace }), rate);
    };
    refuse('batch', 'egress', (t) => (policy(t) ? 0.13 : 0.004));
    refuse('inference', 'ingress', () => 0.008);
    drop('UNSUPPORTED_L3_PROTOCOL', 'inference', 'egress', () => 0.006);
    drop('STALE_OR_UNROUTABLE_IP', 'training', 'egress', (t) => (crash(t) ? 0.09 : 0.015));
    drop('UNSUPPORTED_L3_PROTOCOL', 'monitoring', 'egress', () => 0.01);
    for (const namespace of NAMESPACES) {
      const pair = { source_namespace: namespace, destination_namespace: namespace === 'monitoring' ? 'inference' : namespace };
      counter('hubble_flows_processed_total', hubble(node, { protocol: 'TCP', type: 'Trace', subtype: 'to-endpoint', verdict: 'FORWARDED', ...pair }), () => 480);
      counter('hubble_policy_verdicts_total', hubble(node, { direction: 'egress', match: 'l3-l4', action: 'forwarded', ...pair }), () => 3);
    }
    counter('hubble_policy_verdicts_total', hubble(node, { direction: 'ingress', match: 'none', action: 'audit', source_namespace: 'training', destination_namespace: 'render' }), (t) => (crash(t) ? 0.05 : 0.01));
    for (const source of ['perf_event_ring_buffer', 'hubble_ring_buffer'])
      counter('hubble_lost_events_total', hubble(node, { source }), (t) => (source === 'perf_event_ring_buffer' && node === 'gpu-3' && contention(t) ? 9 : 0.5));
    for (const namespace of NAMESPACES) {
      const queries = { qtypes: 'A', ips_returned: 0, source_namespace: namespace, destination_namespace: 'kube-system' };
      const answers = { qtypes: 'A', ips_returned: 1, source_namespace: 'kube-system', destination_namespace: namespace };
      const asked = namespace === 'training' ? 6 : 3;
      const lost = (t) => (namespace === 'training' && resolver(t) ? 0.17 : 0.002);
      // Queries and responses of the same packets: the same jitter would need the same key, so they get none.
      const exact = (name, labels, rate) => {
        let sum = 0;
        series(name.replace(/_total$/, ''), 'counter', name, labels, (i) => (sum += rate(i * step) * step));
      };
      exact('hubble_dns_queries_total', hubble(node, { rcode: '', ...queries }), () => asked);
      for (const [rcode, share] of [['No Error', 0.55], ['Non-Existent Domain', 0.445], ['Server Failure', 0.005]])
        exact('hubble_dns_responses_total', hubble(node, { rcode, ...answers }), (t) => asked * (share * (1 - lost(t)) + (rcode === 'Server Failure' && namespace === 'training' && resolver(t) ? 0.06 : 0)));
    }
    counter('cilium_forward_count_total', agent(node, { direction: 'EGRESS' }), () => 61000);
    for (const map_name of ['ipcache_v2', 'lxc', 'ct4_global'])
      for (const [outcome, rate] of [['success', 4], ['fail', 0]])
        counter('cilium_bpf_map_ops_total', agent(node, { map_name, operation: 'update', outcome }), (t) => rate + (outcome === 'fail' && map_name === 'ipcache_v2' && storm(t) && rebuilt(node) ? 0.4 : 0));
    counter('cilium_drop_count_total', agent(node, { reason: 'Policy denied', direction: 'EGRESS' }), () => 0.1);
    for (const [map_name, share] of [['ct4_global', 0.46], ['ct_any4_global', 0.22]])
      gauge('cilium_bpf_map_pressure', agent(node, { map_name }), (t, i) => share * load(node + map_name, i, 0.02));
  }

  const PORTS = [[gateway, 8000, 90], [models[0], 6379, 4], [models[1], 6379, 5], [workers[0], 29500, 12], [workers[2], 29500, 11], [others[0], 443, 2], [others[1], 22, 0.4]];
  for (const [p, port, rate] of PORTS)
    counter('hubble_port_distribution_total', hubble(p.node, { protocol: 'TCP', port, source_namespace: p.labels.namespace, source_pod: p.labels.pod }), (t) => rate * (port === 22 && crash(t) ? 40 : 1));

  // --- requests --------------------------------------------------------------------------------------------------------

  const REQUEST = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60];
  const FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10];
  for (const p of models) {
    const target = { job: 'vllm', instance: `${p.name}:8000`, namespace: 'inference', pod: p.name, container: 'engine', model_name: 'llama-3.3-70b', engine: 0 };
    histogram('vllm:e2e_request_latency_seconds', target, REQUEST, () => 6, (t) => (storm(t) ? 2.1 : 1.1), 0.35);
    histogram('vllm:time_to_first_token_seconds', target, FIRST_TOKEN, () => 6, (t) => (storm(t) ? 0.55 : 0.16), 0.4);
  }
  histogram(
    'http_server_request_duration_seconds',
    { job: 'obi', instance: 'gpu-2:9090', namespace: 'monitoring', pod: 'obi-x7k2p', container: 'ebpf-instrument', k8s_namespace_name: 'inference', k8s_pod_name: 'gateway' },
    [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10],
    () => 12,
    (t) => (storm(t) ? 2.4 : 1.15),
    0.35,
  );

  // --- the exporter itself ---------------------------------------------------------------------------------------------

  const SIGNALS = { tcp: [420, 2], rdma: [610, 1], gpu: [180, 3], nccl: [540, 2], encryption: [160, 2] };
  const PROGRAMS = { tcp: 'tcp_retransmit_skb', rdma: 'ib_modify_qp', gpu: 'sched_switch', nccl: 'all_reduce', encryption: 'encrypt_packet' };
  for (const node of NODES) {
    series('up', 'gauge', 'up', chandra(node), () => 1);
    gauge('chandra_build_info', chandra(node, { version: '0.1.0' }), () => 1);
    gauge('chandra_pods_age_seconds', chandra(node), (t, i) => 3 + 2 * load(node, i));
    for (const [signal, [count, hooks]] of Object.entries(SIGNALS)) {
      const lacks = signal === 'gpu' && node === 'gpu-1';
      for (const state of ['up', 'absent', 'disabled', 'failed'])
        gauge('chandra_signal_state', chandra(node, { signal, state }), () => +(state === 'up'));
      gauge('chandra_hook_info', chandra(node, { signal, hook: PROGRAMS[signal], method: signal === 'tcp' ? 'tp_btf' : 'kprobe', reason: 'attached' }), () => 1);
      if (lacks) gauge('chandra_hook_info', chandra(node, { signal, hook: 'drm_sched_job_run', method: 'tracepoint', reason: 'no_hook' }), () => 1);
      gauge('chandra_series', chandra(node, { signal }), () => count + (node === 'gpu-3' ? 150 : 0));
      gauge('chandra_scrape_seconds', chandra(node, { signal }), (t, i) => 0.0008 * hooks * load(node + signal, i));
      const lossy = (t) => signal === 'nccl' && node === 'gpu-3' && contention(t);
      for (const reason of ['map_full', 'unreadable', 'missed_return', 'untimed', 'missed_switch', 'recursion', 'read_failed'])
        counter('chandra_lost_events_total', chandra(node, { signal, reason }), (t) => (reason === 'missed_return' && lossy(t) ? 4 : reason === 'recursion' ? 0.02 : 0));
      for (const [result, rate] of [['pod', 180], ['host', 20], ['unknown', signal === 'tcp' ? 4 : 1]])
        counter('chandra_attribution_total', chandra(node, { signal, result }), () => rate);
      const runs = { tcp: 20, rdma: 2, gpu: 90000, nccl: 900, encryption: 130000 }[signal];
      counter('chandra_program_runs_total', chandra(node, { signal, program: PROGRAMS[signal] }), (t) => runs * (signal === 'tcp' && storm(t) && rebuilt(node) ? 3 : 1));
      counter('chandra_program_run_seconds_total', chandra(node, { signal, program: PROGRAMS[signal] }), () => runs * { tcp: 9e-7, rdma: 2.2e-6, gpu: 1.4e-7, nccl: 1.9e-6, encryption: 2.6e-7 }[signal], false);
    }
  }

  return families;
}

const line = ({ name, labels }, value, at) => `${name}{${labels}} ${+value.toPrecision(12)}${at === undefined ? '' : ` ${at}`}`;

// Writes steps of a cluster to a file, as `promtool tsdb create-blocks-from openmetrics` reads it, and says how many series and
// samples it has.
export async function write(path, families, { start, step, steps }) {
  const out = createWriteStream(path);
  const all = [...families.values()].flatMap(({ series }) => series);
  const values = all.map(() => new Float64Array(steps));
  for (let i = 0; i < steps; i++) all.forEach(({ at }, s) => (values[s][i] = at(i)));
  let s = 0;
  for (const [family, { type, series }] of families) {
    const lines = [`# TYPE ${family} ${type}`];
    for (const one of series) values[s++].forEach((value, i) => lines.push(line(one, value, start + i * step)));
    if (!out.write(lines.join('\n') + '\n')) await new Promise((resolve) => out.once('drain', resolve));
  }
  out.end('# EOF\n');
  await new Promise((resolve) => out.once('finish', resolve));
  return { series: all.length, samples: all.length * steps };
}

// One step of it, as an exporter says it.
export const expose = (families, i) =>
  [...families].flatMap(([family, { type, series }]) => [`# TYPE ${family} ${type}`, ...series.map((one) => line(one, one.at(i)))]).join('\n') + '\n# EOF\n';
