// SPDX-License-Identifier: Apache-2.0
//! What of ours belongs into the values of which chart, and for which of its versions do we know that?

use std::path::Path;

use serde_json::Value;

use crate::{
    Failure,
    keys::{self, Spec},
    render,
};

/// Charts, the versions that our values were checked against, and our files for them.
const CHARTS: [(&str, &[&str], &str); 3] = [
    ("cilium", &["1.19", "1.20"], "helm-values/cilium.yaml"),
    (
        "kube-prometheus-stack",
        &["88"],
        "helm-values/kube-prometheus-stack.yaml",
    ),
    ("prometheus", &["29"], "helm-values/prometheus.yaml"),
];

/// Where we have something and the chart's default is nothing.
const EMPTY: [(&str, &[&[&str]]); 2] = [
    (
        "kube-prometheus-stack",
        &[
            &["additionalPrometheusRulesMap"],
            &["grafana", "dashboardProviders"],
            &["grafana", "dashboards"],
        ],
    ),
    (
        "prometheus",
        &[
            &["serverFiles", "alerting_rules.yml", "groups"],
            &["serverFiles", "recording_rules.yml", "groups"],
        ],
    ),
];

/// What to do where a sidecar has no image.
const NO_IMAGE: &str = "--sidecar needs the exporter's image, and none is published: build it (make image), push it \
    (docs/image.md), and name it by --config: { _config+:: { image: 'registry.example/chandra:0.1.0' } }";

/// A chart at a version.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Its name.
    pub name: &'static str,
    /// The version, without what makes no difference: `1.19`.
    pub version: &'static str,
    /// Its keys, where they are known here.
    pub keys: Option<Spec>,
    file: &'static str,
}

impl Chart {
    /// Finds a chart; without a version at the newest.
    ///
    /// # Errors
    ///
    /// [`Failure::Unknown`] with what there is.
    pub fn find(name: &str, version: Option<&str>) -> Result<Self, Failure> {
        let Some((name, versions, file)) = CHARTS.iter().find(|(known, ..)| *known == name) else {
            let names: Vec<&str> = CHARTS.iter().map(|(name, ..)| *name).collect();
            return Err(Failure::Unknown(format!(
                "unknown chart {name}: there are {}",
                names.join(", ")
            )));
        };
        let same = |known: &&&str| match version {
            None => true,
            Some(version) => {
                let rest = version.trim_start_matches('v').strip_prefix(**known);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '-']))
            }
        };
        let Some(found) = versions.iter().rev().find(same) else {
            let version = version.unwrap_or_default();
            return Err(Failure::Unknown(format!(
                "{name} {version} is not supported: there are {}",
                versions.join(", ")
            )));
        };
        Ok(Self {
            name,
            version: found,
            keys: keys::embedded(name, found),
            file,
        })
    }

    /// Its keys as far as merging asks whether a null there deletes anything.
    pub fn defaults(&self) -> Option<Spec> {
        let empty = EMPTY.iter().find(|(known, _)| *known == self.name);
        let known = self.keys.clone();
        known.or_else(|| empty.map(|(_, paths)| Spec::empty(paths)))
    }

    /// What we want in its values; with `sidecar` the exporter's container too.
    ///
    /// # Errors
    ///
    /// As [`render::files`], and [`Failure::Unknown`] for a chart that has no sidecar, and for a sidecar without an image.
    pub fn values(&self, overrides: Option<&Path>, sidecar: bool) -> Result<Value, Failure> {
        let mut values = render::values(self.file, overrides)?;
        if sidecar {
            if self.name != "cilium" {
                return Err(Failure::Unknown(format!(
                    "--sidecar is for the chart cilium, not for {}",
                    self.name
                )));
            }
            let sidecar = render::values("helm-values/cilium-sidecar.yaml", overrides)?;
            if sidecar.pointer("/extraContainers/0/image") == Some(&"".into()) {
                return Err(Failure::Unknown(NO_IMAGE.to_owned()));
            }
            add(&mut values, sidecar);
        }
        Ok(values)
    }
}

/// Adds the keys of one map to another; ours have no key in common but maps.
fn add(values: &mut Value, more: Value) {
    match (values, more) {
        (Value::Object(values), Value::Object(more)) => {
            for (key, value) in more {
                add(values.entry(key).or_insert(Value::Null), value);
            }
        }
        (values, more) => *values = more,
    }
}
