// SPDX-License-Identifier: Apache-2.0
// data.mjs → Prometheus, with the recording rules → the page → pictures and problems. `draw` runs this in the folder of the
// npm packages.  usage: draw.mjs REPOSITORY CHROMIUM [--out DIR] [NAME...]
import { execFile, spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { extname, join, resolve } from 'node:path';
import { promisify } from 'node:util';
import { chromium } from 'playwright-core';
import { build } from 'vite';
import { end, start, step, write } from './data.mjs';

const WIDTH = 1440;
// Chosen besides "All", to see that the variables do.
const SELECTIONS = { chandra: { namespace: 'inference' }, 'chandra-path': { namespace: 'inference' } };

const run = promisify(execFile);
const [repository, browserPath, ...rest] = process.argv.slice(2);
const option = rest.indexOf('--out');
const out = option < 0 ? join(repository, 'target/dashboards') : resolve(rest.splice(option, 2)[1]);
const wanted = rest;
const folder = mkdtempSync(join(tmpdir(), 'chandra-dashboards-'));
const database = join(folder, 'data');
const say = (text) => console.error(`dashboards: ${text}`);

const listening = async (handler) => {
  const server = createServer(handler).listen(0, '127.0.0.1');
  await new Promise((then) => server.once('listening', then));
  return { server, port: server.address().port };
};

// --- Prometheus -------------------------------------------------------------------------------------------------------

let prometheus;
const api = async (path) => (await (await fetch(`${prometheus.url}/api/v1/${path}`)).json()).data;

async function startPrometheus(ruleFiles = []) {
  const { server, port } = await listening();
  await new Promise((then) => server.close(then));
  const config = join(folder, 'prometheus.yaml');
  writeFileSync(config, JSON.stringify({ rule_files: ruleFiles }));
  const child = spawn('prometheus', [
    `--config.file=${config}`, `--storage.tsdb.path=${database}`, `--web.listen-address=127.0.0.1:${port}`,
    // The page asks from a port of its own. The data are of a fixed day, however long ago.
    '--web.cors.origin=http://127\\.0\\.0\\.1:[0-9]+', '--storage.tsdb.retention.time=100y', '--log.level=error',
  ], { stdio: ['ignore', 'ignore', 'inherit'] });
  prometheus = { child, url: `http://127.0.0.1:${port}` };
  for (let i = 0; ; i++) {
    if (child.exitCode !== null || i === 600) throw new Error('Prometheus does not start');
    if (await fetch(`${prometheus.url}/-/ready`).then((answer) => answer.ok, () => false)) return;
    await new Promise((then) => setTimeout(then, 100));
  }
}

async function stopPrometheus() {
  const { child } = prometheus;
  if (child.exitCode !== null) return;
  child.kill('SIGTERM');
  await new Promise((then) => child.once('exit', then));
}

const record = (files) =>
  run('promtool', ['tsdb', 'create-blocks-from', 'rules', `--url=${prometheus.url}`, `--start=${start}`, `--end=${end}`, `--eval-interval=${step}s`, `--output-dir=${database}`, ...files]);

// Rules that read other rules come after them: promtool asks Prometheus, which knows of new blocks once it starts again.
async function fill() {
  const raw = join(folder, 'raw.txt');
  const { series, samples } = await write(raw);
  await run('promtool', ['tsdb', 'create-blocks-from', 'openmetrics', raw, database], { maxBuffer: 1e8 });
  rmSync(raw);
  await startPrometheus(readdirSync(join(repository, 'alerts')).map((file) => join(repository, 'alerts', file)));
  const { groups } = await api('rules?type=record');
  const rules = groups.flatMap((group) => group.rules).map(({ name, query }) => ({ record: name, expr: query }));
  const depths = new Map();
  const depth = (rule) => {
    if (!depths.has(rule)) depths.set(rule, Math.max(0, ...rules.filter((other) => other !== rule && new RegExp(`(?<![\\w:])${other.record}(?![\\w:])`).test(rule.expr)).map((other) => 1 + depth(other))));
    return depths.get(rule);
  };
  for (let level = 0; ; level++) {
    const here = rules.filter((rule) => depth(rule) === level);
    if (!here.length) break;
    if (level > 0) await startPrometheus();
    const file = join(folder, `rules-${level}.yaml`);
    writeFileSync(file, JSON.stringify({ groups: [{ name: 'level', rules: here }] }));
    await record([file]);
    await stopPrometheus();
  }
  await startPrometheus();
  say(`${series} series, ${samples} samples, ${rules.length} recording rules`);
}

// --- the page ---------------------------------------------------------------------------------------------------------

// What Grafana's server has at addresses of its own.
const asset = (pathname) => {
  const icons = '/public/build/img/icons/';
  if (pathname.startsWith(icons)) return `/../../node_modules/@grafana/ui/dist/public/img/icons/${pathname.slice(icons.length)}`;
  const [, weight] = /^\/public\/fonts\/inter\/Inter-(Regular|Medium)\.woff2$/.exec(pathname) ?? [];
  return weight ? `/../../node_modules/@fontsource/inter/files/inter-latin-${{ Regular: 400, Medium: 500 }[weight]}-normal.woff2` : pathname;
};

async function servePage() {
  const sources = readdirSync('page').map((name) => readFileSync(join('page', name)));
  const version = createHash('sha256').update(Buffer.concat([...sources, readFileSync('package-lock.json')])).digest('hex').slice(0, 16);
  const built = resolve('built', version);
  if (!existsSync(built)) {
    rmSync('built', { recursive: true, force: true });
    await build({ configFile: 'page/vite.config.js', root: 'page', build: { outDir: `${built}.new` } });
    renameSync(`${built}.new`, built);
  }
  const types = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css', '.woff2': 'font/woff2', '.svg': 'image/svg+xml' };
  return listening((request, response) => {
    const { pathname } = new URL(request.url, 'http://page');
    const path = resolve(built, `.${pathname === '/' ? '/index.html' : asset(pathname)}`);
    if (pathname === '/favicon.ico') return response.writeHead(204).end();
    if (!existsSync(path)) return response.writeHead(404).end();
    response.writeHead(200, { 'content-type': types[extname(path)] ?? 'application/octet-stream' }).end(readFileSync(path));
  });
}

const squeezed = (text) => text.replace(/\s+/g, '');

// Draws one view of a dashboard; gives what is wrong with it.
async function draw(browser, address, dashboard, theme, chosen, picture) {
  const context = await browser.newContext({ viewport: { width: WIDTH, height: 900 }, timezoneId: 'UTC', locale: 'en-US', reducedMotion: 'reduce' });
  const page = await context.newPage();
  const problems = new Set();
  page.on('console', (message) => message.type() === 'error' && problems.add(`the page says: ${message.text().slice(0, 300)}`));
  page.on('pageerror', (error) => problems.add(`the page fails: ${error.message.slice(0, 300)}`));
  page.on('requestfailed', (request) => problems.add(`not fetched: ${request.url()} (${request.failure().errorText})`));
  page.on('response', (response) => response.status() >= 500 && problems.add(`${response.status()}: ${response.url()}`));
  const range = /^now-(\d+)h$/.exec(dashboard.time.from);
  const to = end - step;
  const variables = Object.fromEntries(dashboard.templating.list.map(({ name, allValue }) => [name, chosen[name] ?? allValue ?? '']));
  await page.addInitScript((chandra) => (window.chandra = chandra), {
    dashboard, theme, variables, prometheus: prometheus.url, from: to - 3600 * Number(range[1]), to, width: WIDTH - 16,
  });
  await page.goto(address);
  try {
    await page.waitForFunction('window.settled', null, { timeout: 120e3 });
    const report = await page.evaluate('window.report');
    for (const panel of dashboard.panels) {
      const { values, texts, text, plot, problems: own } = report[panel.id];
      const problem = (what) => problems.add(`${panel.title}: ${what}`);
      own.forEach(problem);
      if (own.length) continue;
      if (!values) problem('no data');
      if (!text.includes(panel.title)) problem('its title is not to be seen');
      if (values && !texts.some((one) => squeezed(text).includes(squeezed(one)))) problem(`none of its values is to be read in its unit, such as ${texts[0]}`);
      if (panel.type !== 'stat' && plot < 80) problem(`its plot is ${plot} px high`);
    }
    await page.locator('#drawn').screenshot({ path: picture });
  } catch (error) {
    problems.add(`cannot be drawn: ${error.message.split('\n')[0]}`);
  }
  await context.close();
  return [...problems];
}

// Mistakes in a dashboard, each of which has to be told.
function mistakes(whole) {
  const timeseries = whole.panels.find(({ type }) => type === 'timeseries');
  const one = (change) => {
    const panel = structuredClone(timeseries);
    change(panel);
    return { ...whole, panels: [panel] };
  };
  return {
    'no data': one((panel) => panel.targets.forEach((target) => (target.expr = 'chandra_nothing'))),
    'a query failed': one((panel) => (panel.targets[0].expr = 'sum(')),
    'Grafana knows no unit': one((panel) => (panel.fieldConfig.defaults.unit = 'seconds')),
    'to be read in its unit': one((panel) => (panel.options.legend.showLegend = false)),
    'cannot be drawn': one((panel) => (panel.type = 'graph')),
    'px high': one((panel) => (panel.gridPos.h = 4)),
  };
}

// --- all --------------------------------------------------------------------------------------------------------------

let page;
let browser;
let failed = 0;
try {
  const names = readdirSync(join(repository, 'dashboards')).map((file) => file.replace('.json', ''));
  for (const name of wanted) if (!names.includes(name)) throw new Error(`no dashboard ${name}: ${names.join(' ')}`);
  await fill();
  page = await servePage();
  const address = `http://127.0.0.1:${page.port}/`;
  browser = await chromium.launch({
    executablePath: browserPath,
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
  mkdirSync(out, { recursive: true });
  let pictures = 0;
  let panels = 0;
  const tell = (where, problems) => {
    failed += problems.length;
    problems.forEach((problem) => console.log(`${where}: ${problem.replace(/\s+/g, ' ')}`));
  };
  for (const name of names.filter((name) => !wanted.length || wanted.includes(name))) {
    const dashboard = JSON.parse(readFileSync(join(repository, 'dashboards', `${name}.json`), 'utf8'));
    panels += dashboard.panels.length;
    for (const theme of ['light', 'dark']) {
      for (const [suffix, chosen] of [['', {}], ...(SELECTIONS[name] ? [['-selected', SELECTIONS[name]]] : [])]) {
        const picture = `${name}${suffix}-${theme}`;
        tell(picture, await draw(browser, address, dashboard, theme, chosen, join(out, `${picture}.png`)));
        pictures += 1;
      }
    }
  }
  let made = 0;
  for (const [expected, dashboard] of Object.entries(mistakes(JSON.parse(readFileSync(join(repository, 'dashboards/chandra-tcp.json'), 'utf8'))))) {
    const told = await draw(browser, address, dashboard, 'light', {}, join(folder, 'mistake.png'));
    if (!told.some((problem) => problem.includes(expected))) tell('a mistake made on purpose', [`"${expected}" is not told, but: ${told.join('; ') || 'nothing'}`]);
    made += 1;
  }
  console.log(`dashboards: ${panels} panels in ${pictures} pictures (${out}), ${made} mistakes made on purpose: ${failed} problems`);
} catch (error) {
  console.log(`dashboards: ${(error.stderr || error.message).trim()}`);
  failed += 1;
} finally {
  await browser?.close();
  page?.server.close();
  if (prometheus) await stopPrometheus();
  rmSync(folder, { recursive: true, force: true });
}
process.exitCode = failed ? 1 : 0;
