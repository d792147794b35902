// GPU: how long the threads that drive a GPU wait for a CPU, and the kernel's own GPU scheduler.
local panels = import '../lib/panels.libsonnet';
local text = import '../lib/text.libsonnet';

{
  _config+:: {
    gpu: {
      // Seconds from runnable to running that one in a hundred wake-ups and preemptions of a pod's GPU threads exceeds.
      // While such a thread waits, its GPU runs dry: this is several decode steps of a token. The bound of a bucket (they
      // are powers of two of a microsecond): a quantile within one is a guess.
      GpuRunqueueDelayHigh: { threshold: 0.065536, 'for': '5m', severity: 'ticket' },
    },
  },

  signals+:: {
    gpu: {
      local c = $._config,
      local f = { w: c.window, cluster: c.clusterLabel, node: c.nodeLabel, sel: c.selector },
      local quantile(q, metric, labels) = |||
        histogram_quantile(%(q)g, sum by (%(cluster)s, %(node)s, namespace, pod, %(labels)sle) (rate(%(metric)s_bucket{%(sel)s}[%(w)s])))
      ||| % (f { q: q, metric: metric, labels: std.join('', [label + ', ' for label in labels]) }),

      title: 'GPU',
      question: 'How long do the threads that drive a GPU wait for a CPU?',

      rules: [
        { record: 'pod:chandra_gpu_runqueue_delay_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_gpu_runqueue_delay_seconds', []) },
        {
          record: 'pod:chandra_gpu_runqueue_delay_seconds:rate%(w)s' % f,
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod) (rate(chandra_gpu_runqueue_delay_seconds_sum{%(sel)s}[%(w)s]))' % f,
        },
        {
          record: 'pod_driver:chandra_gpu_processes:sum',
          expr: 'sum by (%(cluster)s, %(node)s, namespace, pod, driver) (chandra_gpu_processes{%(sel)s})' % f,
        },
        { record: 'pod_device_ring:chandra_gpu_job_queue_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_gpu_job_queue_seconds', ['device', 'ring']) },
        { record: 'pod_device_ring:chandra_gpu_job_run_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_gpu_job_run_seconds', ['device', 'ring']) },
        { record: 'pod_call:chandra_cuda_call_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_cuda_call_seconds', ['call']) },
        { record: 'pod_call:chandra_cuda_call_preempted_seconds:p99_rate%(w)s' % f, expr: quantile(0.99, 'chandra_cuda_call_preempted_seconds', ['call']) },
      ],

      alerts: [
        {
          alert: 'GpuRunqueueDelayHigh',
          expr: 'pod:chandra_gpu_runqueue_delay_seconds:p99_rate%(w)s > %(threshold).9g' % (f + c.gpu.GpuRunqueueDelayHigh),
          summary: text.pod(c) + ' waits for a CPU to drive its GPU.',
          description: text.pod(c) + ': one in a hundred times a thread that drives a GPU waits longer than {{ $value | humanizeDuration }} for a CPU, and the GPU waits with it. Seconds waited per second on this node: ' +
                       text.list(c, 'topk(5, pod:chandra_gpu_runqueue_delay_seconds:rate%(w)s{%%s} > 0)' % f, ['cluster', 'node'], text.podItem(text.number('$row.Value'))) + '.',
        },
      ],

      local where = panels.where(c, ['cluster', 'node', 'namespace', 'pod']),
      local p = f { where: where },
      local legend = '{{namespace}} {{pod}} {{%(node)s}}' % f,

      panels: [
        panels.timeseries(
          'Run queue delay of GPU threads, p99',
          'Runnable until running. Above the line GpuRunqueueDelayHigh fires: is the pod throttled by its CPU limit, or is another pod on its cores?',
          [{ expr: 'topk(20, pod:chandra_gpu_runqueue_delay_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend }],
          's',
          [panels.above(c.gpu.GpuRunqueueDelayHigh.threshold)],
        ),
        panels.timeseries(
          'Time that GPU threads wait for a CPU',
          'Seconds waited per second, of all GPU threads of a pod together.',
          [{ expr: 'topk(20, pod:chandra_gpu_runqueue_delay_seconds:rate%(w)s{%(where)s})' % p, legend: legend }],
          'suffix:s/s',
        ),
        panels.timeseries(
          'Processes that drive a GPU',
          'Steady while a job runs. Of NVIDIA a process counts once for each GPU that it has open; chandra_gpu_processes tells which. Monitoring does not count.',
          [{ expr: 'topk(20, pod_driver:chandra_gpu_processes:sum{%(where)s})' % p, legend: legend + ' {{driver}}' }],
          'short',
        ),
        panels.timeseries(
          'DRM jobs: queued until run, p99',
          "The kernel's GPU scheduler: AMD graphics, Intel Xe, nouveau. Not NVIDIA's driver, not ROCm's user queues.",
          [{ expr: 'topk(10, pod_device_ring:chandra_gpu_job_queue_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend + ' {{device}} {{ring}}' }],
          's',
        ),
        panels.timeseries(
          'DRM jobs: run until done, p99',
          'Long jobs make the others queue.',
          [{ expr: 'topk(10, pod_device_ring:chandra_gpu_job_run_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend + ' {{device}} {{ring}}' }],
          's',
        ),
        panels.timeseries(
          'CUDA calls, p99',
          'Opt-in (--cuda-calls). A call that is slow and preempted waits for a CPU; one that is slow and not preempted waits for the driver or the GPU.',
          [
            { expr: 'topk(10, pod_call:chandra_cuda_call_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend + ' {{call}}' },
            { expr: 'topk(10, pod_call:chandra_cuda_call_preempted_seconds:p99_rate%(w)s{%(where)s})' % p, legend: legend + ' {{call}} preempted' },
          ],
          's',
        ),
      ],
    },
  },
}
