// SPDX-License-Identifier: Apache-2.0
//! What is a metric here, and how does it reach the page?
//!
//! Each metric is one [`Desc`] constant, which is the only place its name stands. Families are built anew for each
//! scrape from snapshots: the kernel and the ledger own the counters, so nothing can drift.

use std::{collections::BTreeMap, io::Write};

use exporter_common::histogram::Shape;
use prometheus::{
    Encoder, TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

/// The labels of a pod's series.
pub const POD: [&str; 3] = ["namespace", "pod", "container"];

/// What a value means over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, until what it counts is gone.
    Counter,
    /// May go either way.
    Gauge,
    /// A classic histogram of seconds.
    Histogram,
}

/// One metric: its name, meaning and labels.
#[derive(Debug, PartialEq, Eq)]
pub struct Desc {
    /// The full name.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// One sentence that says what one increment, or the value, means.
    pub help: &'static str,
    /// The pod's labels come first.
    pub per_pod: bool,
    /// Labels beside the pod's.
    pub labels: &'static [&'static str],
    /// Label values that are an enum, for the reference: (label, values).
    pub values: &'static [(&'static str, &'static [&'static str])],
    /// Where the number comes from.
    pub source: &'static str,
}

/// The families of one scrape, in the order of their names.
#[derive(Debug, Default)]
pub struct Families {
    families: BTreeMap<&'static str, (&'static Desc, Vec<Metric>)>,
    series: usize,
}

impl Families {
    /// Adds one series. `labels` are the values of the desc's labels, in its order, the pod's first.
    pub fn add(&mut self, desc: &'static Desc, labels: &[&str], value: f64) {
        let mut metric = metric(desc, labels);
        match desc.kind {
            Kind::Counter => {
                let mut counter = Counter::default();
                counter.set_value(value);
                metric.set_counter(counter);
            }
            Kind::Gauge => {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                metric.set_gauge(gauge);
            }
            Kind::Histogram => unreachable!("{} has buckets", desc.name),
        }
        self.push(desc, metric, 1);
    }

    /// Adds one histogram from its slots in a map: the buckets, then the sum in nanoseconds.
    pub fn add_histogram(
        &mut self,
        desc: &'static Desc,
        labels: &[&str],
        shape: Shape,
        slots: &[u64],
    ) {
        let mut histogram = Histogram::default();
        let mut count = 0;
        let mut buckets = Vec::with_capacity(shape.bounds);
        for (i, events) in slots.iter().enumerate().take(shape.bounds + 1) {
            count += events;
            if let Some(bound) = shape.bound(i) {
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(bound as f64 / 1e9);
                bucket.set_cumulative_count(count);
                buckets.push(bucket);
            }
        }
        histogram.set_bucket(buckets);
        histogram.set_sample_count(count);
        histogram.set_sample_sum(slots.get(shape.sum()).copied().unwrap_or_default() as f64 / 1e9);
        let mut metric = metric(desc, labels);
        metric.set_histogram(histogram);
        // With the bucket without a bound, the sum and the count.
        self.push(desc, metric, shape.bounds + 3);
    }

    fn push(&mut self, desc: &'static Desc, metric: Metric, series: usize) {
        self.families
            .entry(desc.name)
            .or_insert_with(|| (desc, Vec::new()))
            .1
            .push(metric);
        self.series += series;
    }

    /// How many series there are so far.
    pub fn series(&self) -> usize {
        self.series
    }

    /// Writes the text format.
    ///
    /// # Errors
    /// When the writer fails.
    pub fn encode(self, page: &mut impl Write) -> anyhow::Result<()> {
        let families = self.families.into_values().map(|(desc, metrics)| {
            let mut family = MetricFamily::default();
            family.set_name(desc.name.to_owned());
            family.set_help(desc.help.to_owned());
            family.set_field_type(match desc.kind {
                Kind::Counter => MetricType::COUNTER,
                Kind::Gauge => MetricType::GAUGE,
                Kind::Histogram => MetricType::HISTOGRAM,
            });
            family.set_metric(metrics);
            family
        });
        Ok(TextEncoder::new().encode(&families.collect::<Vec<_>>(), page)?)
    }
}

/// A metric without a value.
fn metric(desc: &Desc, labels: &[&str]) -> Metric {
    let names = POD
        .iter()
        .take(if desc.per_pod { POD.len() } else { 0 })
        .chain(desc.labels);
    debug_assert_eq!(
        names.clone().count(),
        labels.len(),
        "{} has other labels",
        desc.name
    );
    let pairs = names.zip(labels).map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    });
    Metric::from_label(pairs.collect())
}
