// SPDX-License-Identifier: Apache-2.0
// A Prometheus of its own in a folder, filled with a data set and what recording rules make of it.
import { execFile, spawn } from 'node:child_process';
import { readdirSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { write } from './data.mjs';

const run = promisify(execFile);

export const listening = async (handler, port = 0) => {
  const server = createServer(handler).listen(port, '127.0.0.1');
  await new Promise((then, fail) => server.once('listening', then).once('error', fail));
  return { server, port: server.address().port };
};

const freePort = async () => {
  const { server, port } = await listening();
  await new Promise((then) => server.close(then));
  return port;
};

export class Prometheus {
  constructor(folder) {
    this.folder = folder;
    this.database = join(folder, 'data');
  }

  // With rules, and something that it scrapes, if any.
  async start({ ruleFiles = [], scrape = [], interval = '15s' } = {}) {
    const port = await freePort();
    const config = join(this.folder, 'prometheus.yaml');
    const global = { scrape_interval: interval, evaluation_interval: interval };
    writeFileSync(config, JSON.stringify({ global, rule_files: ruleFiles, scrape_configs: scrape }));
    this.child = spawn('prometheus', [
      `--config.file=${config}`, `--storage.tsdb.path=${this.database}`, `--web.listen-address=127.0.0.1:${port}`,
      // The page asks from a port of its own. The fixed data are of one day, however long ago.
      '--web.cors.origin=http://127\\.0\\.0\\.1:[0-9]+', '--storage.tsdb.retention.time=100y', '--log.level=error',
    ], { stdio: ['ignore', 'ignore', 'inherit'] });
    this.url = `http://127.0.0.1:${port}`;
    for (let i = 0; ; i++) {
      if (this.child.exitCode !== null || i === 600) throw new Error('Prometheus does not start');
      if (await fetch(`${this.url}/-/ready`).then((answer) => answer.ok, () => false)) return;
      await new Promise((then) => setTimeout(then, 100));
    }
  }

  async stop() {
    const { child } = this;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    child.kill('SIGTERM');
    await new Promise((then) => child.once('exit', then));
  }

  async rules(type) {
    const { data } = await (await fetch(`${this.url}/api/v1/rules?type=${type}`)).json();
    return data.groups.flatMap(({ rules }) => rules);
  }

  // Fills it with steps of a cluster, and with what the recording rules of a folder make of them. It is stopped before and after.
  async fill(families, times, ruleFolder) {
    const raw = join(this.folder, 'raw.txt');
    const written = await write(raw, families, times);
    await run('promtool', ['tsdb', 'create-blocks-from', 'openmetrics', raw, this.database], { maxBuffer: 1e8 });
    rmSync(raw);
    await this.start({ ruleFiles: ruleFiles(ruleFolder) });
    const rules = (await this.rules('record')).map(({ name, query }) => ({ record: name, expr: query }));
    // Rules that read other rules come after them: promtool asks Prometheus, which knows of new blocks once it starts again.
    const depths = new Map();
    const depth = (rule) => {
      if (!depths.has(rule)) depths.set(rule, Math.max(0, ...rules.filter((other) => other !== rule && new RegExp(`(?<![\\w:])${other.record}(?![\\w:])`).test(rule.expr)).map((other) => 1 + depth(other))));
      return depths.get(rule);
    };
    const { start, step, steps } = times;
    for (let level = 0; ; level++) {
      const here = rules.filter((rule) => depth(rule) === level);
      if (!here.length) break;
      if (level > 0) await this.start();
      const file = join(this.folder, `rules-${level}.yaml`);
      writeFileSync(file, JSON.stringify({ groups: [{ name: 'level', rules: here }] }));
      await run('promtool', [
        ...['tsdb', 'create-blocks-from', 'rules', `--url=${this.url}`, `--start=${start}`, `--end=${start + steps * step}`],
        ...[`--eval-interval=${step}s`, `--output-dir=${this.database}`, file],
      ]);
      await this.stop();
    }
    return { ...written, rules: rules.length };
  }
}

export const ruleFiles = (folder) => readdirSync(folder).map((file) => join(folder, file));
