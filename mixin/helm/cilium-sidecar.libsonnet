// Values for the Cilium chart that run the exporter as a container of the agent's pod.
function(c) {
  comment: |||
    Values for the Cilium chart, 1.19 and later: the exporter as a container beside the agent. The exporter's own
    DaemonSet is the better choice; this is for clusters where nothing but Cilium may run on every node.

    What it costs:
    - Every change of the exporter restarts the agents, and with them DNS and L7 proxies, on all nodes.
    - If the exporter crashes in a loop, the Cilium pod is NotReady, and Cilium's operator taints the node.
    - It has the agent's service account, which may do more than read pods.
    - Without hostPID it sees no other process: signals that follow processes (gpu, nccl) cannot work and are disabled;
      rdma sees the devices of the host's network namespace (`rdma system` mode shared) and does not know the owner of
      queue pairs that are older than the exporter.
    - The chart's monitors cannot scrape it: apply manifests/podmonitor-cilium-sidecar.yaml beside it.
    Fill in `image`: none is published. `make image` builds it, docs/image.md says how to push it; until then the API server
    refuses the agents' DaemonSet, and those that run stay.
    Helm replaces lists: if you have extraContainers, use chandra-mixin merge --sidecar my-values.yaml instead.
  |||,
  values: {
    extraContainers: [{
      name: 'chandra',
      image: c.image,
      args: [
        '--web.listen-address=:%d' % c.port,
        '--pods=kube',
        // The agent's own mount of the host's cgroup v2 root.
        '--path.cgroupfs=/run/cilium/cgroupv2',
      ] + ['--disable=' + signal for signal in c.sidecarDisable],
      env: [{ name: 'NODE_NAME', valueFrom: { fieldRef: { fieldPath: 'spec.nodeName' } } }],
      // The agent's pod is in the host's network: this is a port of the node.
      ports: [{ name: 'chandra', containerPort: c.port, hostPort: c.port, protocol: 'TCP' }],
      livenessProbe: { httpGet: { path: '/livez', port: c.port, host: '127.0.0.1' }, periodSeconds: 30 },
      resources: { requests: { cpu: '10m', memory: '32Mi' }, limits: { memory: '128Mi' } },
      securityContext: {
        allowPrivilegeEscalation: false,
        readOnlyRootFilesystem: true,
        // SYS_ADMIN: Debian's and Ubuntu's kernels want it for kprobes. SYS_RESOURCE: 5.10 charges maps to a limit.
        capabilities: { drop: ['ALL'], add: ['BPF', 'PERFMON', 'SYS_ADMIN', 'SYS_RESOURCE'] },
      },
      volumeMounts: [{ name: 'cilium-cgroup', mountPath: '/run/cilium/cgroupv2', mountPropagation: 'HostToContainer', readOnly: true }],
    }],
  },
}
