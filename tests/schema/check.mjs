// SPDX-License-Identifier: Apache-2.0
// Checks what the mixin renders, then makes mistakes in it and requires that each is refused. What is checked are
// TypeScript's literals, not imported JSON: only in a literal is an unknown key an error. `check` runs this in the
// folder of the npm packages.  usage: check.mjs REPOSITORY
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import ts from 'typescript';
import { parse } from 'yaml';

const api = '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';

const item = (name, value, json = JSON.stringify(value, null, 2)) => ({ name, value, json });
const [root] = process.argv.slice(2);
const read = (folder, make) => readdirSync(join(root, folder)).map((file) => make(`${folder}/${file}`, readFileSync(join(root, folder, file), 'utf8')));

// A dashboard's own text keeps its line numbers.
const dashboards = read('dashboards', (name, text) => item(name, JSON.parse(text), text));
const manifests = read('manifests', (name, text) => item(name, parse(text)));

// What is wrong with each item, by its name.
async function problems(items) {
  const found = new Map(items.map(({ name }) => [name, []]));
  for (const { name, value } of items.filter(({ value }) => value.kind)) found.get(name).push(...(await invalid(value)));

  // All in one program: most of the time goes into Grafana's types.
  rmSync('literals', { recursive: true, force: true });
  mkdirSync('literals');
  const files = items.map(({ value, json }, at) => {
    const [type, from] = value.kind ? [`I${value.kind}`, `${api}/${value.kind}`] : ['Dashboard', '../dashboard.js'];
    writeFileSync(`literals/${at}.ts`, `import type { ${type} } from '${from}'; export const literal: ${type} = ${json}`);
    return resolve(`literals/${at}.ts`);
  });
  const program = ts.createProgram(files, { strict: true, noEmit: true, module: ts.ModuleKind.NodeNext, skipLibCheck: true, types: [] });
  for (const { file, start, messageText } of ts.getPreEmitDiagnostics(program)) {
    const at = files.indexOf(file?.fileName);
    // The last line is the most exact.
    const message = ts.flattenDiagnosticMessageText(messageText, '\n').split('\n').at(-1).trim().slice(0, 200);
    if (at < 0) throw new Error(`${file?.fileName}: ${message}`);
    const { line } = file.getLineAndCharacterOfPosition(start);
    found.get(items[at].name).push(`line ${line + 1}, ${items[at].json.split('\n')[line].trim()}: ${message}`);
  }
  return found;
}

// The operator's own schema also knows the forms of strings, such as durations.
async function invalid(value) {
  try {
    const models = await import(`${api}/${value.kind}`);
    new models[value.kind](value).validate();
  } catch (error) {
    return [error.message];
  }
  return value.kind === 'PrometheusRule' && !value.spec.groups?.length ? ['no groups'] : [];
}

function mistakes() {
  const made = [];
  const spoil = (from, name, change) => {
    const value = structuredClone(from);
    change(value);
    made.push(item(name, value));
  };

  const panels = dashboards.flatMap(({ value }) => value.panels);
  const types = ['barchart', 'heatmap', 'stat', 'table', 'timeseries'];
  const one = { ...dashboards[0].value, panels: types.map((type) => panels.find((panel) => panel.type === type)) };
  const panel = (type, name, change) => spoil(one, `${type}: ${name}`, ({ panels }) => change(panels[types.indexOf(type)]));
  for (const type of types) {
    panel(type, 'unknown option', ({ options }) => (options.unknown = 1));
    panel(type, 'unknown field setting', ({ fieldConfig }) => (fieldConfig.defaults.custom = { unknown: 1 }));
    panel(type, 'unknown override', ({ fieldConfig }) => fieldConfig.overrides.push({ matcher: { id: 'byName', options: 'A' }, properties: [{ id: 'custom.unknown', value: 1 }] }));
    panel(type, 'unit is a number', ({ fieldConfig }) => (fieldConfig.defaults.unit = 5));
    panel(type, 'unknown format of a query', ({ targets }) => (targets[0].format = 'unknown'));
    panel(type, 'no query', ({ targets }) => delete targets[0].expr);
  }
  panel('barchart', 'option is a string', ({ options }) => (options.barWidth = '0.9'));
  panel('barchart', 'unknown option of a transformation', ({ transformations }) => (transformations[0].options.unknown = 1));
  panel('stat', "another type's option", ({ options }) => (options.barWidth = 0.9));
  panel('timeseries', 'unknown matcher', ({ fieldConfig }) => fieldConfig.overrides.push({ matcher: { id: 'byUnknown', options: 'A' }, properties: [] }));
  panel('timeseries', 'unknown style', ({ fieldConfig }) => (fieldConfig.defaults.custom.drawStyle = 'unknown'));
  panel('timeseries', 'unknown place of the legend', ({ options }) => (options.legend.placement = 'unknown'));
  panel('timeseries', 'unknown type', (panel) => (panel.type = 'graph'));
  spoil(one, 'dashboard: unknown key', (dashboard) => (dashboard.unknown = 1));
  spoil(one, 'dashboard: unknown tooltip', (dashboard) => (dashboard.graphTooltip = 7));
  spoil(one, 'dashboard: unknown key of a variable', ({ templating }) => (templating.list[0].unknown = 1));
  spoil(one, 'dashboard: unknown visibility of a variable', ({ templating }) => (templating.list[0].hide = 7));
  spoil(one, 'dashboard: unknown type of a link', ({ links }) => (links[0].type = 'unknown'));

  const kind = (kind) => manifests.find(({ value }) => value.kind === kind).value;
  const rule = (name, change) => spoil(kind('PrometheusRule'), `rule: ${name}`, ({ spec }) => change(spec.groups.at(-1).rules[0], spec));
  rule('unknown key', (rule) => (rule.unknown = 1));
  rule('duration is a number', (rule) => (rule.for = 5));
  rule('duration without a unit', (rule) => (rule.for = '5'));
  rule('no expression', (rule) => delete rule.expr);
  rule('no name of a group', (_, { groups }) => delete groups[0].name);
  rule('no groups', (_, spec) => delete spec.groups);
  spoil(kind('PodMonitor'), 'monitor: unknown key', ({ spec }) => (spec.podMetricsEndpoints[0].honourLabels = true));
  spoil(kind('PodMonitor'), 'monitor: labels are honoured by a string', ({ spec }) => (spec.podMetricsEndpoints[0].honorLabels = 'true'));
  spoil(kind('PodMonitor'), 'monitor: unknown kind', (monitor) => (monitor.kind = 'PodMonitors'));
  return made;
}

const wrong = mistakes();
const found = await problems([...dashboards, ...manifests, ...wrong]);
const failures = [
  ...[...dashboards, ...manifests].flatMap(({ name }) => found.get(name).map((problem) => `${name}: ${problem}`)),
  ...wrong.filter(({ name }) => !found.get(name).length).map(({ name }) => `accepted, and should not be: ${name}`),
];
failures.forEach((failure) => console.error(failure));
console.log(`schema: ${dashboards.length} dashboards, ${manifests.length} manifests, ${wrong.length} mistakes made on purpose: ${failures.length} problems`);
process.exit(failures.length ? 1 : 0);
