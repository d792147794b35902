// The one file that knows Grafana's schema (checked against @grafana/schema). Panels are of the types `barchart`,
// `heatmap`, `stat`, `timeseries` and `table`; a query is `{ expr, legend }`. `tests/dashboards/draw` shows what comes of it.
{
  // Units. Grafana's own for packets a second puts a prefix before a fraction (0.4 is 400 mp/s), and a CPU second a second
  // is no time.
  perSecond:: 'suffix:/s',
  cores:: 'suffix:cores',

  local datasource = { type: 'prometheus', uid: '${datasource}' },

  // Selects what the dashboard's variables choose. A missing label matches "All".
  where(c, labels)::
    std.join(', ', ['%s=~"$%s"' % [{ cluster: c.clusterLabel, node: c.nodeLabel, namespace: 'namespace', pod: 'pod' }[label], label] for label in labels]),

  local targets(queries, extra) = [
    { refId: std.char(65 + i), datasource: datasource, expr: queries[i].expr, legendFormat: queries[i].legend, range: true } + extra
    for i in std.range(0, std.length(queries) - 1)
  ],

  // Up to above the last threshold, whatever the values: a healthy panel is flat, and shows how far away the line is.
  local scale(thresholds) = if thresholds == [] then {} else { axisSoftMax: 1.25 * thresholds[std.length(thresholds) - 1].value },

  local steps(thresholds) = {
    mode: 'absolute',
    // A null is the schema's minus infinity.
    steps: [{ color: 'green', value: null }] + thresholds,
  },

  // A value from which on something is wrong, in the colour of its urgency.
  above(value, color='red'):: { color: color, value: value },

  local panel(type, title, description, unit) = {
    type: type,
    title: title,
    description: description,
    datasource: datasource,
    fieldConfig: { defaults: { unit: unit }, overrides: [] },
    w:: 12,
    // The legend has a third of it: its head and three whole rows.
    h:: 9,
  },

  timeseries(title, description, queries, unit, thresholds=[], stack=false, min=0)::
    panel('timeseries', title, description, unit) {
      targets: targets(queries, {}),
      fieldConfig+: {
        defaults+: {
          [if min != null then 'min']: min,
          color: { mode: 'palette-classic' },
          custom: {
            drawStyle: 'line',
            lineWidth: 1,
            // Areas of twenty lines over each other are one brown.
            fillOpacity: if stack then 30 else 0,
            showPoints: 'auto',
            spanNulls: false,
            stacking: { mode: if stack then 'normal' else 'none', group: 'A' },
            thresholdsStyle: { mode: if thresholds == [] then 'off' else 'dashed' },
          } + scale(thresholds),
          thresholds: steps(thresholds),
        },
      },
      options: {
        legend: { displayMode: 'table', placement: 'bottom', showLegend: true, calcs: ['lastNotNull', 'max'], sortBy: 'Max', sortDesc: true },
        tooltip: { mode: 'multi', sort: 'desc' },
      },
    },

  // Series whose reference is in `refIds` on the right axis, in their own unit, as thick lines that have the colour of
  // their value. No dashes: those are the thresholds.
  onTheRight(refIds, unit, label, thresholds=[]):: {
    fieldConfig+: {
      overrides+: [
        {
          matcher: { id: 'byFrameRefID', options: id },
          properties: [
            { id: 'unit', value: unit },
            { id: 'custom.axisPlacement', value: 'right' },
            { id: 'custom.axisLabel', value: label },
            { id: 'custom.lineWidth', value: 3 },
          ] + if thresholds == [] then [] else [
            { id: 'custom.axisSoftMax', value: scale(thresholds).axisSoftMax },
            { id: 'thresholds', value: steps(thresholds) },
            { id: 'custom.thresholdsStyle', value: { mode: 'dashed' } },
            { id: 'color', value: { mode: 'thresholds' } },
            { id: 'custom.gradientMode', value: 'scheme' },
          ],
        }
        for id in refIds
      ],
    },
  },

  // The line has the colour of its value.
  colouredByThreshold:: {
    fieldConfig+: { defaults+: { color: { mode: 'thresholds' }, custom+: { lineWidth: 2, gradientMode: 'scheme' } } },
  },

  // The whole width, with the legend beside it.
  wide:: { w: 24, options+: { legend+: { placement: 'right', width: 480 } } },

  // One of several below each other that share a time axis: wide, and with the same room for the values.
  leg:: $.wide { h: 5, fieldConfig+: { defaults+: { custom+: { axisWidth: 80 } } } },

  // A scale up to this value at least, where no threshold gives one: small noise shall not fill the panel.
  atLeast(value):: { fieldConfig+: { defaults+: { custom+: { axisSoftMax: value } } } },

  // Thresholds of the series of one reference alone.
  thresholdsOf(refId, unit, thresholds):: {
    fieldConfig+: {
      overrides+: [{
        matcher: { id: 'byFrameRefID', options: refId },
        properties: [
          { id: 'unit', value: unit },
          { id: 'thresholds', value: steps(thresholds) },
          { id: 'color', value: { mode: 'thresholds' } },
        ],
      }],
    },
  },

  stat(title, description, queries, unit, thresholds=[])::
    panel('stat', title, description, unit) {
      targets: targets(queries, {}),
      fieldConfig+: { defaults+: { min: 0, color: { mode: 'thresholds' }, thresholds: steps(thresholds), noValue: 'none' } },
      options: {
        colorMode: 'value',
        graphMode: 'area',
        justifyMode: 'auto',
        orientation: 'auto',
        textMode: 'value_and_name',
        wideLayout: true,
        reduceOptions: { calcs: ['lastNotNull'], fields: '', values: false },
      },
    },

  // One bar per value of `group`, in it one part per value of `part`: the instant table is pivoted.
  barchart(title, description, expr, unit, group, part, thresholds=[])::
    panel('barchart', title, description, unit) {
      targets: targets([{ expr: expr, legend: '' }], { format: 'table', instant: true, range: false }),
      transformations: [
        { id: 'groupingToMatrix', options: { rowField: group, columnField: part, valueField: 'Value', emptyValue: 'zero' } },
      ],
      fieldConfig+: {
        defaults+: {
          min: 0,
          color: { mode: 'palette-classic' },
          noValue: 'no drops',
          custom: { lineWidth: 1, fillOpacity: 80, thresholdsStyle: { mode: if thresholds == [] then 'off' else 'dashed' } },
          thresholds: steps(thresholds),
        },
      },
      options: {
        xField: '%s\\%s' % [group, part],
        orientation: 'auto',
        barWidth: 0.9,
        groupWidth: 0.7,
        barRadius: 0,
        fullHighlight: false,
        showValue: 'auto',
        stacking: 'normal',
        xTickLabelRotation: 0,
        xTickLabelSpacing: 0,
        legend: { displayMode: 'list', placement: 'bottom', showLegend: true, calcs: [] },
        tooltip: { mode: 'single', sort: 'none' },
      },
    },

  // One row per series, as they are: in Prometheus' heatmap format Grafana would take the rows for cumulative buckets
  // and subtract each from the next.
  heatmap(title, description, query, unit)::
    panel('heatmap', title, description, unit) {
      targets: targets([query], { format: 'time_series' }),
      fieldConfig+: { defaults+: { custom: { scaleDistribution: { type: 'linear' }, hideFrom: { legend: false, tooltip: false, viz: false } } } },
      options: {
        calculate: false,
        cellGap: 1,
        cellValues: { unit: unit },
        // Nothing is no colour, on a light ground and on a dark one, and the square root keeps a little visible beside a lot.
        color: { mode: 'opacity', fill: 'dark-orange', exponent: 0.5, scale: 'exponential', scheme: 'Oranges', steps: 64, reverse: false },
        exemplars: { color: 'rgba(255,0,255,0.7)' },
        filterValues: { le: 1e-9 },
        legend: { show: true },
        rowsFrame: { layout: 'auto' },
        showValue: 'never',
        tooltip: { mode: 'single', yHistogram: false, showColorScale: true },
        yAxis: { axisPlacement: 'left', reverse: false, unit: 'short' },
      },
    },

  // Instant rows, one column per label in `columns` and the value at the end.
  table(title, description, expr, unit, columns, value)::
    panel('table', title, description, unit) {
      targets: targets([{ expr: expr, legend: '' }], { format: 'table', instant: true, range: false }),
      transformations: [
        {
          id: 'organize',
          options: {
            excludeByName: { Time: true, __name__: true },
            includeByName: {},
            indexByName: { [columns[i]]: i for i in std.range(0, std.length(columns) - 1) } + { Value: std.length(columns) },
            renameByName: { Value: value },
          },
        },
      ],
      options: { showHeader: true, cellHeight: 'sm' },
    },

  local variable(c, name, label, query) = {
    name: name,
    label: label,
    type: 'query',
    datasource: datasource,
    query: { query: query, refId: 'variable-' + name },
    includeAll: true,
    multi: true,
    // A series without the label is in "All" too.
    allValue: '.*',
    current: { selected: true, text: ['All'], value: ['$__all'] },
    refresh: 2,
    sort: 1,
    hide: 0,
    options: [],
    regex: '',
    skipUrlSync: false,
  },

  // `others` are dashboards that it links to: `{ title, uid }`.
  dashboard(c, title, uid, description, list, others=[]):: {
    // Left to right, a new line where a panel does not fit.
    local placed = std.foldl(
      function(at, panel)
        local wraps = at.x + panel.w > 24;
        local x = if wraps then 0 else at.x;
        local y = if wraps then at.y + at.h else at.y;
        {
          x: x + panel.w,
          y: y,
          h: if wraps then panel.h else std.max(at.h, panel.h),
          list: at.list + [panel { id: std.length(at.list) + 1, gridPos: { x: x, y: y, w: panel.w, h: panel.h } }],
        },
      list,
      { x: 0, y: 0, h: 0, list: [] },
    ),
    title: title,
    uid: uid,
    description: description,
    tags: c.grafana.tags,
    schemaVersion: 39,
    editable: true,
    graphTooltip: 1,
    timezone: 'browser',
    refresh: c.grafana.refresh,
    time: { from: c.grafana.from, to: 'now' },
    links: [{
      title: 'Chandra',
      type: 'dashboards',
      tags: ['chandra-mixin'],
      asDropdown: true,
      includeVars: true,
      keepTime: true,
      targetBlank: false,
      icon: 'external link',
      tooltip: '',
      url: '',
    }] + [
      {
        title: other.title,
        type: 'link',
        url: '/d/' + other.uid,
        asDropdown: false,
        includeVars: false,
        keepTime: true,
        tags: [],
        targetBlank: false,
        icon: 'dashboard',
        tooltip: 'A dashboard of others, if it is imported here (_config.grafana.others)',
      }
      for other in others
    ],
    annotations: { list: [] },
    templating: {
      list: [
        {
          name: 'datasource',
          label: 'Data source',
          type: 'datasource',
          query: 'prometheus',
          current: { selected: true, text: c.grafana.datasource, value: c.grafana.datasource },
          refresh: 1,
          hide: 0,
          includeAll: false,
          multi: false,
          options: [],
          regex: '',
          skipUrlSync: false,
        },
        variable(c, 'cluster', 'Cluster', 'label_values(chandra_build_info{%s}, %s)' % [c.selector, c.clusterLabel]),
        variable(c, 'node', 'Node', 'label_values(chandra_build_info{%s, %s}, %s)' % [c.selector, $.where(c, ['cluster']), c.nodeLabel]),
        variable(c, 'namespace', 'Namespace', 'label_values(chandra_tcp_retransmits_total{%s, %s}, namespace)' % [c.selector, $.where(c, ['cluster', 'node'])]),
        variable(c, 'pod', 'Pod', 'label_values(chandra_tcp_retransmits_total{%s, %s}, pod)' % [c.selector, $.where(c, ['cluster', 'node', 'namespace'])]),
      ],
    },
    panels: placed.list,
  },
}
