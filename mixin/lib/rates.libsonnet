// Rates of counters whose series may be born with a value.
{
  // Seconds of a duration as Prometheus writes it ("5m", "1h30m").
  seconds(duration)::
    local units = { ms: 0.001, s: 1, m: 60, h: 3600, d: 86400, w: 604800, y: 31536000 };
    // What is no duration is refused where the expressions that have it are parsed.
    local unit(name) = if std.objectHas(units, name) then units[name] else 1;
    local isDigit(ch) = std.length(std.findSubstr(ch, '0123456789')) > 0;
    // [seconds so far, digits, unit], over the characters and a digit that ends the last unit.
    local step(state, ch) =
      if isDigit(ch) && state[2] != '' then [state[0] + std.parseInt(state[1]) * unit(state[2]), ch, '']
      else if isDigit(ch) then [state[0], state[1] + ch, '']
      else [state[0], state[1], state[2] + ch];
    std.foldl(step, std.stringChars(duration + '0'), [0, '', ''])[0],

  // A fifth of what rates are taken over: a minute.
  step(c):: '%gs' % ($.seconds(c.window) / 5),

  // What `metric` rose by in the last `window`, for each series that `labels` tell apart (beside node and cluster): lines to
  // stand between the parentheses of an aggregation.
  //
  // increase() takes the first value of a series for what was there before. A series that was missing in a scrape of its
  // exporter within the window was born in it, and rose by all that it shows. In a new Prometheus, after an outage of the
  // scrape or under a new label both miss the same scrapes, and nothing counts as born. Where several exporters have one node
  // (two clusters without a cluster's label, a sidecar beside a DaemonSet) it is compared with the one that was scraped most.
  increase(c, metric, labels, window)::
    local f = {
      series: '%s{%s}' % [metric, c.selector],
      exporter: 'chandra_build_info{%s}' % c.selector,
      node: '%s, %s' % [c.clusterLabel, c.nodeLabel],
      labels: std.join(', ', [c.clusterLabel, c.nodeLabel] + labels),
      window: window,
    };
    std.join('\n  ', [
      '',
      '%(series)s',
      'and on (%(labels)s)',
      'sum by (%(labels)s) (count_over_time(%(series)s[%(window)s]))',
      '< on (%(node)s) group_left ()',
      'max by (%(node)s) (sum by (%(node)s, instance) (count_over_time(%(exporter)s[%(window)s])))',
      'or',
      'increase(%(series)s[%(window)s])',
    ]) % f + '\n',
}
