// SPDX-License-Identifier: Apache-2.0
//! Which classic tracepoints does the kernel have, and where do their records have their fields?

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// Where tracefs is mounted: by itself, or by debugfs.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The events of the running kernel.
#[derive(Clone, Debug)]
pub struct Tracefs {
    events: PathBuf,
}

/// A tracepoint's record: its fields by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Format(BTreeMap<String, Field>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Field {
    /// Where it begins, in bytes.
    offset: u32,
    /// The text before its name.
    kind: String,
}

impl Tracefs {
    /// Finds it; `None` where it is not mounted, or may not be read.
    pub fn find() -> Option<Self> {
        PLACES.iter().find_map(|place| Self::at(Path::new(place)))
    }

    /// That which is mounted at a place.
    pub fn at(place: &Path) -> Option<Self> {
        let events = place.join("events");
        events.is_dir().then_some(Self { events })
    }

    /// Says if there is a tracepoint, named `group:event`.
    pub fn has(&self, tracepoint: &str) -> bool {
        self.folder(tracepoint).join("id").exists()
    }

    /// Returns the fields of a tracepoint, named `group:event`.
    ///
    /// # Errors
    /// When there is no such tracepoint, or it cannot be read.
    pub fn format(&self, tracepoint: &str) -> io::Result<Format> {
        let text = fs::read_to_string(self.folder(tracepoint).join("format"))?;
        Ok(Format::parse(&text))
    }

    fn folder(&self, tracepoint: &str) -> PathBuf {
        self.events.join(tracepoint.replacen(':', "/", 1))
    }
}

impl Format {
    /// Reads lines like `field:u64 fence_context; offset:24; size:8; signed:0;`, with tabs (kernel/trace/trace_events.c, `f_show`).
    fn parse(text: &str) -> Self {
        let field = |line: &str| {
            let mut parts = line.trim().strip_prefix("field:")?.split(';');
            let text = parts.next()?;
            let whole = text.split([' ', '*']).next_back()?;
            let name = whole.split('[').next()?;
            let kind = text[..text.len() - whole.len()].trim_end();
            let offset = parts.find_map(|part| part.trim().strip_prefix("offset:"))?;
            let field = Field {
                offset: offset.parse().ok()?,
                kind: kind.to_owned(),
            };
            Some((name.to_owned(), field))
        };
        Self(text.lines().filter_map(field).collect())
    }

    /// Returns where a field begins; `None` where the record has no such field.
    pub fn offset(&self, field: &str) -> Option<u32> {
        self.0.get(field).map(|field| field.offset)
    }

    /// Says if a field is a pointer, not the thing itself or where it lies in the record.
    pub fn is_pointer(&self, field: &str) -> bool {
        let field = self.0.get(field);
        field.is_some_and(|field| field.kind.ends_with('*'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As 6.12 prints it, shortened.
    const OLD: &str = "name: drm_run_job\nID: 1234\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\
        \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
        \tfield:struct drm_sched_entity * entity;\toffset:8;\tsize:8;\tsigned:0;\n\
        \tfield:struct dma_fence * fence;\toffset:16;\tsize:8;\tsigned:0;\n\
        \tfield:__data_loc char[] name;\toffset:24;\tsize:4;\tsigned:0;\n\
        \tfield:u8 mac[6];\toffset:28;\tsize:6;\tsigned:0;\n\n\
        print fmt: \"entity=%p\", REC->entity\n";

    #[test]
    fn fields_are_found_whatever_their_types() {
        let format = Format::parse(OLD);
        for (field, offset) in [
            ("common_pid", 4),
            ("entity", 8),
            ("fence", 16),
            ("name", 24),
            ("mac", 28),
        ] {
            assert_eq!(format.offset(field), Some(offset), "{field}");
        }
        assert_eq!(format.offset("fence_context"), None);
        assert!(format.is_pointer("fence"));
        assert!(!format.is_pointer("name"));
        let pointer = "field:const char * name;\toffset:24;\tsize:8;\tsigned:0;";
        assert!(Format::parse(pointer).is_pointer("name"));
        assert_eq!(Format::parse(""), Format::default());
        assert_eq!(Format::parse("field:;offset:x;"), Format::default());
    }

    #[test]
    fn a_tracepoint_is_there_once_its_module_is() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(Tracefs::at(folder.path()).is_none());
        fs::create_dir_all(folder.path().join("events/a/b")).expect("made");
        let tracefs = Tracefs::at(folder.path()).expect("mounted");
        assert!(!tracefs.has("a:b"));
        assert!(tracefs.format("a:b").is_err());
        fs::write(folder.path().join("events/a/b/id"), "7\n").expect("written");
        fs::write(folder.path().join("events/a/b/format"), OLD).expect("written");
        assert!(tracefs.has("a:b"));
        let format = tracefs.format("a:b").expect("there");
        assert_eq!(format.offset("fence"), Some(16));
    }
}
