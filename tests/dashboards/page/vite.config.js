// SPDX-License-Identifier: Apache-2.0
import react from '@vitejs/plugin-react';
import { defineConfig } from 'vite';

export default defineConfig({
  plugins: [react()],
  // Comments of others that mislead the bundler are none of ours.
  logLevel: 'error',
  // Some of what Grafana's components import asks for the environment of node.
  define: { 'process.env': {} },
  build: { target: 'esnext', minify: false, reportCompressedSize: false, chunkSizeWarningLimit: 1e6 },
});
