// SPDX-License-Identifier: Apache-2.0
// What a rendered dashboard may hold: Grafana's own types, put together per panel type (its `Panel` leaves options and
// custom fields open), and as JSON has them.
import type { Dashboard as Whole, DataQuery, FieldConfig, Panel as AnyPanel } from '@grafana/schema';
import type * as barchart from '@grafana/schema/dist/esm/raw/composable/barchart/panelcfg/x/BarChartPanelCfg_types.gen';
import type * as heatmap from '@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen';
import type * as stat from '@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen';
import type * as table from '@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen';
import type * as timeseries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

// Enums by value, and no key is required: Grafana has a default for each.
type Json<T> =
  T extends string ? `${T}`
  : T extends number ? (`${number}` extends `${T}` ? number : `${T}` extends `${infer Value extends number}` ? Value : never)
  : T extends (infer Item)[] ? Json<Item>[]
  : T extends object ? { [Key in keyof T]?: Json<T[Key]> }
  : T;

// Overrides name a field's setting by its path.
type Settings<Custom> = Json<Omit<FieldConfig, 'custom'>> & { [Key in keyof Custom & string as `custom.${Key}`]?: Json<Custom[Key]> };
type Property<All> = { [Id in keyof All]-?: { id: Id; value: All[Id] } }[keyof All];

// @grafana/schema has no types of these three.
type Query = Json<DataQuery> & {
  refId: string;
  expr: string;
  legendFormat: string;
  range: boolean;
  instant?: boolean;
  format?: 'heatmap' | 'table' | 'time_series';
};
type Matcher = { id: 'byFrameRefID' | 'byName' | 'byRegexp'; options: string };
type Transformation =
  | { id: 'groupingToMatrix'; options: { rowField: string; columnField: string; valueField: string; emptyValue?: 'empty' | 'false' | 'null' | 'true' | 'zero' } }
  | { id: 'organize'; options: { excludeByName: Record<string, boolean>; includeByName: Record<string, boolean>; indexByName: Record<string, number>; renameByName: Record<string, string> } };

type Panel<Type, Options, Custom> = Json<Omit<AnyPanel, 'type' | 'options' | 'fieldConfig' | 'targets' | 'transformations'>> & {
  type: Type;
  options: Json<Options>;
  fieldConfig: {
    defaults: Json<Omit<FieldConfig, 'custom'>> & { custom?: Json<Custom> };
    overrides: { matcher: Matcher; properties: Property<Settings<Custom>>[] }[];
  };
  targets: Query[];
  transformations?: Transformation[];
};

export type Dashboard = Json<Omit<Whole, 'panels'>> & {
  uid: string;
  title: string;
  panels: (
    | Panel<'barchart', barchart.Options, barchart.FieldConfig>
    | Panel<'heatmap', heatmap.Options, heatmap.FieldConfig>
    | Panel<'stat', stat.Options, Record<string, never>>
    | Panel<'table', table.Options, table.FieldConfig>
    | Panel<'timeseries', timeseries.Options, timeseries.FieldConfig>
  )[];
};
