// The words of alerts: Prometheus templates for who it is about and for lists that a query gives when the alert fires.
{
  local key(c, label) = { cluster: c.clusterLabel, node: c.nodeLabel }[label],
  local name(c, label) = if label == 'cluster' || label == 'node' then key(c, label) else label,

  node(c, known='node', unknown='an unnamed node'):: '{{ with $labels.%s }}%s {{ . }}{{ else }}%s{{ end }}' % [c.nodeLabel, known, unknown],

  // The pod, or what the pod labels mean where they name none; see docs/design.md, "Special labels".
  pod(c)::
    '{{ if $labels.namespace }}Pod {{ $labels.namespace }}/{{ $labels.pod }}' +
    '{{ else if eq $labels.pod "unknown" }}An unknown pod{{ else if eq $labels.pod "other" }}A pod beyond --max-owners' +
    '{{ else }}The host itself{{ end }} on ' + $.node(c),

  // The container, where each has an alert of its own. With `--pods none` it is all that names the owner.
  container(c)::
    '{{ if $labels.namespace }}Pod {{ $labels.namespace }}/{{ $labels.pod }}{{ with $labels.container }} ({{ . }}){{ end }}' +
    '{{ else }}{{ $labels.container }}{{ end }} on ' + $.node(c),

  // A number of three digits: Prometheus' own `humanize` writes 0.1 as 100m.
  number(value):: '{{ if lt %s 1.0 }}{{ printf "%%.2g" %s }}{{ else }}{{ humanize %s }}{{ end }}' % [value, value, value],

  // The rows of `expr`, worst first, each as `item` (a template of `$row`). `%s` in `expr` stands for the matchers that
  // select what the alert is about, by `labels`. Without a row it says `none`.
  list(c, expr, labels, item, none='no data')::
    local matchers = std.join(',', [name(c, label) + '=%q' for label in labels]);
    local values = std.join(' ', ['$labels.' + name(c, label) for label in labels]);
    '{{ with printf `sort_desc(%s)` %s | query }}' % [expr % matchers, values] +
    '{{ range $i, $row := . }}{{ if $i }}, {{ end }}%s{{ end }}{{ else }}%s{{ end }}' % [item, none],

  // A row's pod, and its value in a unit.
  podItem(value):: '{{ with $row.Labels.namespace }}{{ . }}/{{ end }}{{ or $row.Labels.pod "the host" }} ' + value,
}
