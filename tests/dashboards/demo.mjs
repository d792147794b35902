// SPDX-License-Identifier: Apache-2.0
// A cluster that never was, live: Prometheus scrapes it, evaluates the rules, and the page shows the dashboards. `demo` runs this in the
// folder of the npm packages.  usage: demo.mjs RENDERED [PORT]
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { cluster, expose, INCIDENTS } from './data.mjs';
import { listening, Prometheus, ruleFiles } from './prometheus.mjs';
import { servePage } from './serve.mjs';

const STEP = 5;
// How long it has been healthy before it begins, in seconds; how often something goes wrong, and for how long.
const BEFORE = 20 * 60;
const EVERY = 120;
const LASTS = 90;

const [rendered, port = '0'] = process.argv.slice(2);
// The first look comes first.
const names = readdirSync(join(rendered, 'dashboards')).map((file) => file.replace('.json', '')).sort();
const dashboards = Object.fromEntries(names.map((name) => [name, JSON.parse(readFileSync(join(rendered, 'dashboards', `${name}.json`), 'utf8'))]));
const folder = mkdtempSync(join(tmpdir(), 'chandra-demo-'));
const prometheus = new Prometheus(folder);
const say = (text) => console.log(text);

// What is wrong `t` seconds after the first step, for how long, and what comes next, when.
const order = Object.keys(INCIDENTS);
function now(t) {
  const live = t - BEFORE;
  const turn = Math.floor(live / EVERY);
  if (live < 0) return { next: order[0], left: -live };
  const within = live % EVERY;
  const incident = order[turn % order.length];
  return within < LASTS ? { incident, since: within, left: LASTS - within } : { next: order[(turn + 1) % order.length], left: EVERY - within };
}
const since = (incident, t) => {
  const at = now(t);
  return at.incident === incident ? at.since : -1;
};

const families = cluster(STEP, since);
const start = Math.floor(Date.now() / 1000 / STEP) * STEP - BEFORE;
const clock = () => Date.now() / 1000 - start;

// The step that is now. Those that nobody asked for have been, all the same.
let step = BEFORE / STEP - 1;
let page = '';
function metrics() {
  for (const due = Math.floor(clock() / STEP); step < due; step++) page = expose(families, step + 1);
  return page;
}

const escaped = (value) => JSON.stringify(value).replace(/</g, '\\u003c');

function answer(url, index) {
  if (url.pathname === '/now') return { type: 'application/json', body: JSON.stringify({ ...now(clock()), incidents: INCIDENTS }) };
  const name = url.pathname === '/' ? 'chandra' : /^\/d\/([a-z-]+)$/.exec(url.pathname)?.[1];
  const dashboard = name && Object.hasOwn(dashboards, name) && dashboards[name];
  if (!dashboard) return undefined;
  const minutes = Number(/^now-(\d+)m$/.exec(dashboard.time.from)[1]);
  const chosen = ({ name, allValue }) => [name, url.searchParams.get(name) ?? allValue ?? ''];
  const chandra = {
    dashboard, theme: url.searchParams.get('theme') === 'light' ? 'light' : 'dark', prometheus: prometheus.url, step: STEP,
    variables: Object.fromEntries(dashboard.templating.list.map(chosen)),
    live: { minutes, refresh: 10, name, names },
  };
  return { type: 'text/html', body: index.replace('<div id="root">', `<script>window.chandra = ${escaped(chandra)};</script>$&`) };
}

let target;
let served;
async function end(code) {
  served?.server.closeAllConnections();
  served?.server.close();
  target?.server.closeAllConnections();
  target?.server.close();
  await prometheus.stop();
  rmSync(folder, { recursive: true, force: true });
  process.exit(code);
}
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.once(signal, () => end(0));

try {
  say('demo: twenty healthy minutes are made up …');
  // The steps that are in the past are asked for here, those to come by Prometheus.
  await prometheus.fill(families, { start, step: STEP, steps: BEFORE / STEP }, join(rendered, 'alerts'));
  target = await listening((_request, response) => {
    response.writeHead(200, { 'content-type': 'application/openmetrics-text; version=1.0.0; charset=utf-8' }).end(metrics());
  });
  metrics();
  const scrape = { job_name: 'demo', honor_labels: true, static_configs: [{ targets: [`127.0.0.1:${target.port}`] }] };
  await prometheus.start({ ruleFiles: ruleFiles(join(rendered, 'alerts')), scrape: [scrape], interval: `${STEP}s` });
  served = await servePage((url) => answer(url, served.index), Number(port));
  say(`dashboards   http://127.0.0.1:${served.port}/   drawn with Grafana's components, not by Grafana`);
  say(`prometheus   ${prometheus.url}/alerts`);
  say('Ctrl-C ends it. Nothing of it is measured: every number is made up.');
  let told;
  setInterval(() => {
    const { incident } = now(clock());
    if (incident === told) return;
    told = incident;
    say(`${new Date().toISOString().slice(11, 19)}  ${incident ? INCIDENTS[incident] : 'healthy'}`);
  }, 1000);
} catch (error) {
  console.error(`demo: ${(error.stderr || error.message).trim()}`);
  await end(1);
}
