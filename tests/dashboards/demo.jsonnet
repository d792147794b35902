// SPDX-License-Identifier: Apache-2.0
// What the demo has shorter, so that an incident of a minute and a half is seen, and its alert fires, before the next one: nothing to use.
local shorter(alerts) = std.mapWithKey(
  function(name, own) if std.isObject(own) && std.objectHas(own, 'for') then own { 'for': '15s' } else own,
  alerts,
);

{
  _config+:: {
    window: '1m',
    grafana+: { from: 'now-20m', refresh: '10s' },
    hubble: shorter(super.hubble),
    tcp: shorter(super.tcp),
    rdma: shorter(super.rdma),
    gpu: shorter(super.gpu),
    nccl: shorter(super.nccl),
    encryption: shorter(super.encryption),
    exporter: shorter(super.exporter),
  },
}
