// SPDX-License-Identifier: Apache-2.0
// data.mjs → Prometheus, with the recording rules → the page → pictures and problems. `draw` runs this in the folder of the
// npm packages.  usage: draw.mjs REPOSITORY CHROMIUM [--out DIR] [NAME...]
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { chromium } from 'playwright-core';
import { cluster, fixed, script } from './data.mjs';
import { Prometheus } from './prometheus.mjs';
import { servePage } from './serve.mjs';

// As on a large screen and on a small one.
const WIDTHS = [1920, 1280];
// Chosen besides "All", to see that the variables do.
const SELECTIONS = { chandra: { namespace: 'inference' }, 'chandra-path': { namespace: 'inference' } };

const [repository, browserPath, ...rest] = process.argv.slice(2);
const option = rest.indexOf('--out');
const out = option < 0 ? join(repository, 'target/dashboards') : resolve(rest.splice(option, 2)[1]);
const wanted = rest;
const folder = mkdtempSync(join(tmpdir(), 'chandra-dashboards-'));
const prometheus = new Prometheus(folder);
const say = (text) => console.error(`dashboards: ${text}`);

const squeezed = (text) => text.replace(/\s+/g, '');

// Draws one view of a dashboard; gives what is wrong with it.
async function draw(browser, address, dashboard, theme, width, chosen, picture) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, timezoneId: 'UTC', locale: 'en-US', reducedMotion: 'reduce' });
  const page = await context.newPage();
  const problems = new Set();
  page.on('console', (message) => message.type() === 'error' && problems.add(`the page says: ${message.text().slice(0, 300)}`));
  page.on('pageerror', (error) => problems.add(`the page fails: ${error.message.slice(0, 300)}`));
  page.on('requestfailed', (request) => problems.add(`not fetched: ${request.url()} (${request.failure().errorText})`));
  page.on('response', (response) => response.status() >= 500 && problems.add(`${response.status()}: ${response.url()}`));
  const range = /^now-(\d+)h$/.exec(dashboard.time.from);
  const to = fixed.start + (fixed.steps - 1) * fixed.step;
  const variables = Object.fromEntries(dashboard.templating.list.map(({ name, allValue }) => [name, chosen[name] ?? allValue ?? '']));
  await page.addInitScript((chandra) => (window.chandra = chandra), {
    dashboard, theme, variables, prometheus: prometheus.url, from: to - 3600 * Number(range[1]), to, width: width - 16,
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
  const { series, samples, rules } = await prometheus.fill(cluster(fixed.step, script), fixed, join(repository, 'alerts'));
  say(`${series} series, ${samples} samples, ${rules} recording rules`);
  await prometheus.start();
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
        for (const width of WIDTHS) {
          const picture = `${name}${suffix}-${theme}-${width}`;
          tell(picture, await draw(browser, address, dashboard, theme, width, chosen, join(out, `${picture}.png`)));
          pictures += 1;
        }
      }
    }
  }
  let made = 0;
  for (const [expected, dashboard] of Object.entries(mistakes(JSON.parse(readFileSync(join(repository, 'dashboards/chandra-tcp.json'), 'utf8'))))) {
    const told = await draw(browser, address, dashboard, 'light', WIDTHS[0], {}, join(folder, 'mistake.png'));
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
  await prometheus.stop();
  rmSync(folder, { recursive: true, force: true });
}
process.exitCode = failed ? 1 : 0;
