// SPDX-License-Identifier: Apache-2.0
//! What is known now, and what is told of it?

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::Looker;
use crate::libraries::{
    Identity,
    watch::{Note, Snapshot},
};

/// Notes that are told.
const NOTES: usize = 20;

impl Looker {
    pub(super) fn snapshot(&self) -> Snapshot {
        let of_use = |identity: &&Identity| self.files.contains_key(identity);
        let mut processes = BTreeMap::new();
        let mut pods: BTreeMap<Identity, BTreeSet<Arc<str>>> = BTreeMap::new();
        for (process, look) in &self.looks {
            let files: Vec<_> = look.files.iter().filter(of_use).copied().collect();
            for file in &files {
                pods.entry(*file).or_default().insert(Arc::clone(&look.pod));
            }
            if !files.is_empty() {
                processes.insert(*process, files);
            }
        }
        Snapshot {
            files: self.files.clone(),
            processes,
            pods,
            notes: self.notes(),
            skipped: self.skipped,
        }
    }

    fn notes(&self) -> Vec<Note> {
        let mut notes = Vec::new();
        let refused = self.refused.values();
        let refused = refused.map(|refused| (&*refused.path, &*refused.why));
        let slow = self.slow.values().map(|slow| (&*slow.path, &*slow.why));
        let mut about = Note::of_files(refused.chain(slow));
        let looks = self.looks.iter();
        let beyond = looks
            .filter(|(_, look)| look.beyond)
            .map(|(process, _)| process);
        if let Some(first) = beyond.clone().min() {
            notes.push(Note::plain(format!(
                "process {first}{} has more mappings or files than are read or remembered, of which some may be missed",
                others(beyond.count() - 1)
            )));
        }
        let waiting = self.pods.values().filter(|pod| pod.waits).count();
        if waiting > 0 {
            about.push(Note::plain(format!(
                "processes of {waiting} pods or units are looked at later: what they have mapped takes more than its share of the time"
            )));
        }
        let mut unseen: Vec<_> = self
            .looks
            .iter()
            .filter_map(|(process, look)| Some((process, look.trouble.as_ref()?)))
            .collect();
        unseen.sort();
        if let Some((_, why)) = unseen.first() {
            notes.push(Note::plain(format!("{why}{}", others(unseen.len() - 1))));
        }
        let more = about.len().saturating_sub(NOTES);
        about.truncate(NOTES);
        notes.extend(about);
        if more > 0 {
            notes.push(Note::plain(format!("and {more} reasons more")));
        }
        notes
    }
}

fn others(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!(" (and {count} processes more)"),
    }
}
