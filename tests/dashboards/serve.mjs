// SPDX-License-Identifier: Apache-2.0
// The page, built once and served. `answer(pathname, request)` may have an answer of its own: { type, body }.
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { extname, resolve } from 'node:path';
import { build } from 'vite';
import { listening } from './prometheus.mjs';

// What Grafana's server has at addresses of its own.
const asset = (pathname) => {
  const icons = '/public/build/img/icons/';
  if (pathname.startsWith(icons)) return `/../../node_modules/@grafana/ui/dist/public/img/icons/${pathname.slice(icons.length)}`;
  const [, weight] = /^\/public\/fonts\/inter\/Inter-(Regular|Medium)\.woff2$/.exec(pathname) ?? [];
  return weight ? `/../../node_modules/@fontsource/inter/files/inter-latin-${{ Regular: 400, Medium: 500 }[weight]}-normal.woff2` : pathname;
};

const TYPES = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css', '.woff2': 'font/woff2', '.svg': 'image/svg+xml' };

export async function servePage(answer = () => undefined, port = 0) {
  const sources = readdirSync('page').map((name) => readFileSync(`page/${name}`));
  const version = createHash('sha256').update(Buffer.concat([...sources, readFileSync('package-lock.json')])).digest('hex').slice(0, 16);
  const built = resolve('built', version);
  if (!existsSync(built)) {
    rmSync('built', { recursive: true, force: true });
    await build({ configFile: 'page/vite.config.js', root: 'page', build: { outDir: `${built}.new` } });
    renameSync(`${built}.new`, built);
  }
  const index = readFileSync(resolve(built, 'index.html'), 'utf8');
  const served = await listening((request, response) => {
    const url = new URL(request.url, 'http://page');
    const own = answer(url);
    if (own) return response.writeHead(own.status ?? 200, { 'content-type': own.type, 'cache-control': 'no-store' }).end(own.body);
    const path = resolve(built, `.${url.pathname === '/' ? '/index.html' : asset(url.pathname)}`);
    if (url.pathname === '/favicon.ico') return response.writeHead(204).end();
    // What lies beside the page is not the page's.
    const inside = [built, resolve('node_modules')].some((folder) => path.startsWith(`${folder}/`));
    if (!inside || !existsSync(path)) return response.writeHead(404).end();
    response.writeHead(200, { 'content-type': TYPES[extname(path)] ?? 'application/octet-stream' }).end(readFileSync(path));
  }, port);
  return { ...served, index };
}
