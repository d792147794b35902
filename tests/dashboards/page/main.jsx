// SPDX-License-Identifier: Apache-2.0
// Draws one dashboard with Grafana's components, not with Grafana: `@grafana/data` transforms the frames and applies the
// field overrides, `@grafana/ui` draws time series, stats, tables, legends and the panels around them. Bar chart and
// heatmap are in neither package; they are drawn here, from the same frames.
//
// `draw.mjs` sets window.chandra = { dashboard, theme, prometheus, from, to, variables, width } and takes window.report when
// window.settled says so. `demo.mjs` sets `live` instead of `from`, `to` and `width`: the view ends now, is as wide as the window, and is renewed.
import {
  createTheme, dateTime, FieldConfigOptionsRegistry, FieldType, formattedValueToString, getDisplayValueAlignmentFactors,
  getFieldDisplayName, getFieldDisplayValues, getFieldSeriesColor, getValueFormats, applyFieldOverrides, cacheFieldDisplayNames,
  standardTransformers, standardTransformersRegistry, ThemeContext, toDataFrame, transformDataFrame,
} from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, TimeSeries, VizLayout, VizLegend, VizRepeater } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { Component, useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { firstValueFrom } from 'rxjs';

const { dashboard, theme: mode, prometheus, variables, live, step: leastStep = 15 } = window.chandra;
const theme = createTheme({ colors: { mode } });
const timeZone = 'utc';

// What is looked at.
let { from, to } = window.chandra;
let timeRange;
function look() {
  if (live) {
    to = Math.floor(Date.now() / 1000 / leastStep) * leastStep;
    from = to - 60 * live.minutes;
  }
  timeRange = { from: dateTime(from * 1000), to: dateTime(to * 1000), raw: { from: dashboard.time.from, to: dashboard.time.to } };
}
look();

// Grafana's own sizes: 24 columns, rows of 30 px, 8 px between.
const GAP = 8;
const width = window.chandra.width ?? document.documentElement.clientWidth - 2 * GAP;
const cell = ({ x, y, w, h }) => ({ left: (x * (width + GAP)) / 24, top: y * 38, width: (w * (width + GAP)) / 24 - GAP, height: h * 38 - GAP });

const replace = (text) => text
  .replace(/\$__range\b/g, `${to - from}s`)
  .replace(/\$\{?(\w+)\}?/g, (whole, name) => (name in variables ? variables[name] : whole));

standardTransformersRegistry.setInit(() =>
  ['groupingToMatrix', 'organize'].map((id) => {
    const [transformation] = Object.values(standardTransformers).filter((one) => one.id === id);
    return { id, name: transformation.name, transformation: () => transformation };
  }),
);

// What Grafana registers of a panel's settings, as far as this dashboard has any: the plugins that do it are not in the
// packages.
function registry(panel) {
  const custom = new Set(Object.keys(panel.fieldConfig.defaults.custom ?? {}));
  for (const { properties } of panel.fieldConfig.overrides) for (const { id } of properties) if (id.startsWith('custom.')) custom.add(id.slice(7));
  const item = (id, path, isCustom) => ({ id, path, isCustom, name: id, process: (value) => value, shouldApply: () => true });
  const standard = ['unit', 'min', 'max', 'decimals', 'displayName', 'color', 'noValue', 'thresholds', 'mappings'];
  const all = new FieldConfigOptionsRegistry();
  standard.forEach((id) => all.register(item(id, id, false)));
  custom.forEach((path) => all.register(item(`custom.${path}`, path, true)));
  return all;
}

// --- data -----------------------------------------------------------------------------------------------------------

async function ask(path, parameters) {
  const answer = await fetch(`${prometheus}/api/v1/${path}`, { method: 'POST', body: new URLSearchParams(parameters) });
  const { status, error, data } = await answer.json();
  if (status !== 'success') throw new Error(error);
  return data.result;
}

// The frames that Grafana's data source makes of a target.
async function query(target, panelWidth) {
  const expr = replace(target.expr);
  const names = ({ metric }) => (target.legendFormat ? target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => metric[label] ?? '') : JSON.stringify(metric));
  if (target.instant) {
    const rows = await ask('query', { query: expr, time: to });
    if (!rows.length) return [];
    const labels = [...new Set(rows.flatMap(({ metric }) => Object.keys(metric)))].sort();
    return [toDataFrame({
      refId: target.refId,
      fields: [
        { name: 'Time', type: FieldType.time, values: rows.map(({ value }) => value[0] * 1000) },
        ...labels.map((label) => ({ name: label, type: FieldType.string, config: { filterable: true }, values: rows.map(({ metric }) => metric[label] ?? '') })),
        { name: 'Value', type: FieldType.number, values: rows.map(({ value }) => parseFloat(value[1])) },
      ],
    })];
  }
  // No more points than pixels, and not more often than is scraped.
  const step = Math.max(leastStep, Math.ceil((to - from) / panelWidth));
  const result = await ask('query_range', { query: expr, start: from, end: to, step });
  // A step without a value is a gap, as Grafana's panel has it.
  const steps = Array.from({ length: Math.floor((to - from) / step) + 1 }, (_, i) => from + i * step);
  return result.map((one) => {
    const values = new Map(one.values);
    return toDataFrame({
      refId: target.refId,
      name: names(one),
      fields: [
        { name: 'Time', type: FieldType.time, config: { interval: step * 1000 }, values: steps.map((at) => at * 1000) },
        { name: 'Value', type: FieldType.number, labels: one.metric, config: { displayNameFromDS: names(one) }, values: steps.map((at) => (values.has(at) ? parseFloat(values.get(at)) : null)) },
      ],
    });
  });
}

async function load(panel, panelWidth) {
  const raw = (await Promise.all(panel.targets.map((target) => query(target, panelWidth)))).flat();
  const transformed = panel.transformations ? await firstValueFrom(transformDataFrame(panel.transformations, raw)) : raw;
  return applyFieldOverrides({
    data: transformed, fieldConfig: panel.fieldConfig, fieldConfigRegistry: registry(panel), replaceVariables: replace, theme, timeZone,
  });
}

const numbers = (frames) => frames.flatMap((frame) => frame.fields.filter(({ type }) => type === FieldType.number).map((field) => ({ frame, field })));
const last = ({ values }) => values.findLast((value) => value != null && !Number.isNaN(value));
const shown = (field, value) => formattedValueToString(field.display(value));

// --- panels ---------------------------------------------------------------------------------------------------------

function Timeseries({ panel, frames, width, height }) {
  // So is what is no number.
  for (const { field } of numbers(frames)) field.values = field.values.map((value) => (Number.isFinite(value) ? value : null));
  return <TimeSeries frames={frames} width={width} height={height} timeRange={timeRange} timeZone={timeZone} legend={panel.options.legend} options={panel.options} />;
}

function Stat({ panel, frames, width, height }) {
  const { options, fieldConfig } = panel;
  const getValues = () =>
    getFieldDisplayValues({ fieldConfig, reduceOptions: options.reduceOptions, replaceVariables: replace, theme, data: frames, sparkline: options.graphMode !== 'none', timeZone })
      .map((value) => ({ ...value, sparkline: value.sparkline && { ...value.sparkline, timeRange } }));
  return (
    <VizRepeater
      getValues={getValues} source={frames} width={width} height={height} orientation={options.orientation} autoGrid={true} itemSpacing={3} renderCounter={0}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={({ value, alignmentFactors, width, height, count }) => (
        <BigValue alignmentFactors={alignmentFactors}
          value={value.display} sparkline={value.sparkline} count={count} width={width} height={height} theme={theme} colorMode={options.colorMode}
          graphMode={options.graphMode} text={options.text} justifyMode={options.justifyMode} textMode={options.textMode} wideLayout={options.wideLayout}
        />
      )}
    />
  );
}

function Table({ frames, width, height }) {
  cacheFieldDisplayNames(frames);
  return <TableNG data={frames[0]} width={width} height={height} timeRange={timeRange} cellHeight="sm" noHeader={false} fieldConfig={{ defaults: {}, overrides: [] }} getActions={() => []} structureRev={1} />;
}

const paint = { font: { fontSize: 12, fontFamily: theme.typography.fontFamily }, text: theme.colors.text.primary, grid: theme.colors.border.weak };

// A pleasant step for about `n` lines.
function ticks(max, n) {
  const rough = max / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((candidate) => candidate >= rough);
  return Array.from({ length: Math.floor(max / step + 1e-9) + 1 }, (_, i) => i * step);
}

function Barchart({ panel, frames, width, height }) {
  const [frame] = frames;
  const { options } = panel;
  const groups = frame.fields.find(({ name }) => name === options.xField);
  if (!groups) throw new Error(`no field ${options.xField}`);
  const bars = frame.fields.filter(({ type }) => type === FieldType.number);
  const items = bars.map((field) => ({ label: getFieldDisplayName(field, frame, frames), color: getFieldSeriesColor(field, theme).color, yAxis: 1 }));
  const legend = <VizLayout.Legend placement={options.legend.placement}><VizLegend items={items} placement={options.legend.placement} displayMode={options.legend.displayMode} /></VizLayout.Legend>;
  const lines = bars[0].config.custom?.thresholdsStyle?.mode === 'off' ? [] : bars[0].config.thresholds.steps.filter(({ value }) => Number.isFinite(value));
  if (options.stacking !== 'normal') throw new Error(`no stacking ${options.stacking}`);
  const most = Math.max(...groups.values.map((_, i) => bars.reduce((sum, { values }) => sum + values[i], 0)), ...lines.map(({ value }) => value)) * 1.1;
  return (
    <VizLayout width={width} height={height} legend={legend}>
      {(w, h) => {
        const left = 64, bottom = 26, top = 8;
        const y = (value) => top + (h - bottom - top) * (1 - value / most);
        const group = (w - left) / groups.values.length;
        const bar = group * options.groupWidth * options.barWidth;
        return (
          <svg width={w} height={h} data-plot={h - bottom - top}>
            {ticks(most, 5).map((value) => (
              <g key={value}>
                <line x1={left} x2={w} y1={y(value)} y2={y(value)} stroke={paint.grid} />
                <text x={left - 6} y={y(value) + 4} textAnchor="end" fill={paint.text} {...paint.font}>{shown(bars[0], value)}</text>
              </g>
            ))}
            {groups.values.map((name, i) => (
              <g key={name}>
                <text x={left + group * (i + 0.5)} y={h - 8} textAnchor="middle" fill={paint.text} {...paint.font}>{name || '(none)'}</text>
                {bars.map((field, b) => {
                  const value = field.values[i];
                  if (!value) return null;
                  const below = bars.slice(0, b).reduce((sum, { values }) => sum + values[i], 0);
                  const height = y(below) - y(below + value);
                  const x = left + group * (i + 0.5) - bar / 2;
                  return (
                    <g key={field.name}>
                      <rect x={x} width={bar} y={y(below + value)} height={height} fill={getFieldSeriesColor(field, theme).color} fillOpacity={field.config.custom.fillOpacity / 100} />
                      {height > 14 && <text x={x + bar / 2} y={y(below + value) + 13} textAnchor="middle" fill={theme.colors.getContrastText(getFieldSeriesColor(field, theme).color)} {...paint.font}>{shown(field, value)}</text>}
                    </g>
                  );
                })}
              </g>
            ))}
            {lines.map(({ value, color }) => <line key={value} x1={left} x2={w} y1={y(value)} y2={y(value)} stroke={theme.visualization.getColorByName(color)} strokeDasharray="10 10" strokeWidth="2" />)}
          </svg>
        );
      }}
    </VizLayout>
  );
}

function Heatmap({ panel, frames, width, height }) {
  const { color, filterValues } = panel.options;
  if (color.mode !== 'opacity') throw new Error(`no colours of mode ${color.mode}`);
  const rows = frames.map((frame) => ({ frame, time: frame.fields[0].values, field: frame.fields[1] }));
  const most = Math.max(...rows.flatMap(({ field }) => field.values.filter(Number.isFinite)));
  const fill = theme.visualization.getColorByName(color.fill);
  const opacity = (value) => (value / most) ** color.exponent;
  const names = rows.map(({ frame, field }) => getFieldDisplayName(field, frame, frames));
  const left = Math.min(width * 0.35, 14 + 6.6 * Math.max(...names.map(({ length }) => length)));
  const bottom = 22, foot = 26;
  const h = height - bottom - foot;
  const row = h / rows.length;
  const x = (time) => left + ((width - left) * (time / 1000 - from)) / (to - from);
  const step = rows[0].frame.fields[0].config.interval;
  const clock = Array.from({ length: Math.ceil((to - from) / 600) }, (_, i) => Math.ceil(from / 600) * 600 + i * 600).filter((t) => t <= to);
  return (
    <svg width={width} height={height} data-plot={h} shapeRendering="crispEdges">
      {rows.map(({ time, field }, i) => (
        <g key={i}>
          <text x={left - 6} y={h - (i + 0.5) * row + 4} textAnchor="end" fill={paint.text} {...paint.font}>{names[i]}</text>
          {time.map((t, k) => field.values[k] > filterValues.le && (
            <rect key={k} x={x(t)} y={h - (i + 1) * row} width={Math.max(0.5, x(t + step) - x(t))} height={Math.max(1, row - panel.options.cellGap)} fill={fill} fillOpacity={opacity(field.values[k])} />
          ))}
        </g>
      ))}
      {clock.map((t, i) => <text key={t} x={x(t * 1000)} y={h + 16} textAnchor={i ? 'middle' : 'start'} fill={paint.text} {...paint.font}>{new Date(t * 1000).toISOString().slice(11, 16)}</text>)}
      {Array.from({ length: 64 }, (_, i) => <rect key={i} x={left + i * 3} width="3" y={height - 18} height="8" fill={fill} fillOpacity={opacity((most * i) / 63)} />)}
      <text x={left - 6} y={height - 10} textAnchor="end" fill={paint.text} {...paint.font}>{shown(rows[0].field, 0)}</text>
      <text x={left + 64 * 3 + 6} y={height - 10} fill={paint.text} {...paint.font}>{shown(rows[0].field, most)}</text>
    </svg>
  );
}

const KINDS = { barchart: Barchart, heatmap: Heatmap, stat: Stat, table: Table, timeseries: Timeseries };

const report = (window.report = {});
const known = new Set(getValueFormats().flatMap(({ submenu }) => submenu.map(({ value }) => value)));

class Boundary extends Component {
  state = {};
  static getDerivedStateFromError(error) {
    return { error };
  }
  componentDidCatch(error) {
    report[this.props.id].problems.push(`cannot be drawn: ${error.message}`);
  }
  render() {
    return this.state.error ? <pre style={{ color: theme.colors.error.text }}>{String(this.state.error)}</pre> : this.props.children;
  }
}

function Panel({ panel, turn }) {
  const [frames, setFrames] = useState();
  const [error, setError] = useState();
  const { left, top, width, height } = cell(panel.gridPos);
  useEffect(() => {
    const mine = (report[panel.id] = { title: panel.title, type: panel.type, problems: [] });
    load(panel, width).then(
      (frames) => {
        const all = numbers(frames).filter(({ field }) => last(field) !== undefined);
        mine.values = all.length;
        // What has to be read in the panel: at least one of its values, in its unit.
        mine.texts = all.map(({ field }) => shown(field, panel.type === 'table' ? field.values[0] : panel.type === 'heatmap' ? Math.max(...numbers(frames).flatMap(({ field }) => field.values.filter(Number.isFinite))) : last(field)));
        mine.units = [...new Set(numbers(frames).map(({ field }) => field.config.unit))];
        for (const unit of mine.units) if (!known.has(unit) && !/^(prefix|suffix):/.test(unit)) mine.problems.push(`Grafana knows no unit ${unit}`);
        setFrames(frames);
        setError();
      },
      (why) => {
        mine.problems.push(`a query failed: ${why.message}`);
        setError(why.message);
      },
    );
  }, [turn]);
  const Kind = KINDS[panel.type];
  const body = (width, height) => {
    if (error) return <div style={{ color: theme.colors.error.text }}>{error}</div>;
    if (!frames) return null;
    if (!numbers(frames).length) return <div style={{ textAlign: 'center', paddingTop: height / 2 - 10 }}>{panel.fieldConfig.defaults.noValue ?? 'No data'}</div>;
    return <Boundary id={panel.id}><Kind panel={panel} frames={frames} width={width} height={height} /></Boundary>;
  };
  return (
    <div data-panel={panel.id} style={{ position: 'absolute', left, top }}>
      <PanelChrome title={panel.title} description={panel.description} width={width} height={height} padding={panel.type === 'table' ? 'none' : 'md'}>{body}</PanelChrome>
    </div>
  );
}

// Of the demo: what is wrong now, and the way to the other dashboards.
function Bar() {
  const [now, setNow] = useState();
  useEffect(() => {
    const ask = () => fetch('/now').then((answer) => answer.json()).then(setNow, () => setNow({ ended: true }));
    ask();
    const timer = setInterval(ask, 1000);
    return () => clearInterval(timer);
  }, []);
  const other = mode === 'dark' ? 'light' : 'dark';
  const link = { color: theme.colors.text.link, marginRight: 16, whiteSpace: 'nowrap' };
  const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, '0')}`;
  const said = !now ? '' : now.ended ? 'The demo has ended.' : now.incident ? `Now, for ${clock(now.since)}: ${now.incidents[now.incident]}` : `Healthy. In ${clock(now.left)}: ${now.incidents[now.next]}`;
  return (
    <div style={{ padding: '8px 4px', lineHeight: 1.7 }}>
      <div>
        {live.names.map((name) => <a key={name} href={`/d/${name}?theme=${mode}`} style={{ ...link, fontWeight: name === live.name ? 500 : 400, textDecoration: name === live.name ? 'underline' : 'none' }}>{name}</a>)}
        <a href={`?theme=${other}`} style={link}>{other}</a>
        <a href={`${prometheus}/alerts`} style={link}>alerts in Prometheus</a>
      </div>
      <div style={{ color: now?.incident || now?.ended ? theme.colors.error.text : theme.colors.success.text }}>{said}</div>
    </div>
  );
}

function Dashboard() {
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    if (!live) return undefined;
    const timer = setInterval(() => {
      look();
      setTurn((turn) => turn + 1);
    }, 1000 * live.refresh);
    return () => clearInterval(timer);
  }, []);
  const height = Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h)) * 38;
  const clock = (at) => new Date(Math.round(at / 60) * 60e3).toISOString().slice(11, 16);
  const chosen = dashboard.templating.list.filter(({ type }) => type === 'query').map(({ name, label }) => `${label}: ${variables[name] === '.*' ? 'All' : variables[name]}`);
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div id="drawn" style={{ width: width + 2 * GAP, padding: GAP, background: theme.colors.background.canvas, color: theme.colors.text.primary }}>
        {live && <Bar />}
        <div style={{ display: 'flex', gap: 24, alignItems: 'baseline', padding: `0 4px ${GAP}px` }}>
          <span style={{ fontSize: 18, fontWeight: 500 }}>{dashboard.title}</span>
          <span style={{ color: theme.colors.text.secondary }}>{chosen.join('   ·   ')}</span>
          <span style={{ color: theme.colors.text.secondary, marginLeft: 'auto' }}>{clock(from)} to {clock(to)}   ·   drawn with Grafana's components, not by Grafana{live && '; every number is made up'}</span>
        </div>
        <div style={{ position: 'relative', height: height - GAP }}>{dashboard.panels.map((panel) => <Panel key={panel.id} panel={panel} turn={turn} />)}</div>
      </div>
    </ThemeContext.Provider>
  );
}

createRoot(document.getElementById('root')).render(<Dashboard />);

// Everything is drawn when each panel has its values or its problem, fonts are there, and nothing moves for a while.
(async () => {
  while (dashboard.panels.some(({ id }) => report[id]?.values === undefined && !report[id]?.problems.length)) await new Promise((then) => setTimeout(then, 50));
  await document.fonts.ready;
  await new Promise((then) => setTimeout(then, 700));
  for (const panel of dashboard.panels) {
    const element = document.querySelector(`[data-panel="${panel.id}"]`);
    const plot = element.querySelector('.u-over');
    report[panel.id].text = element.textContent;
    report[panel.id].plot = plot ? plot.clientHeight : Number(element.querySelector('[data-plot]')?.dataset.plot ?? NaN);
  }
  window.settled = true;
})();
