// SPDX-License-Identifier: Apache-2.0
//! What does an operator import? Dashboards, Prometheus rules and Helm values, from one evaluation of one jsonnet
//! source. How do they come into a values file that exists already, and what does Helm accept there in silence?
//!
//! jsonnet says what is rendered, as one tree; JSON and YAML are written here, so that every engine gives the same bytes.
#![forbid(unsafe_code)]

pub mod cilium;
pub mod jsonnet;
pub mod keys;
pub mod lint;
pub mod merge;
pub mod ours;
pub mod proof;
pub mod render;
pub mod wanted;
pub mod write;
pub mod yaml;

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// Why nothing was rendered, merged or judged.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A file that cannot be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The source, or the user's overrides, are not jsonnet or do not evaluate.
    #[error("{0}")]
    Jsonnet(Place),
    /// The overrides evaluate to something that cannot be rendered.
    #[error("{0}")]
    Config(Place),
    /// A chart or a version that is not known here.
    #[error("{0}")]
    Unknown(String),
    /// A values file that cannot be read, or not be merged into.
    #[error("{}:{}:{}: {}", .0.display(), .1.line, .1.column, .1.message)]
    Values(PathBuf, yaml::Problem),
    /// A file that is not what it is taken for.
    #[error("{}: {}", .0.display(), .1)]
    File(PathBuf, String),
    /// A value that YAML cannot hold.
    #[error("cannot write YAML: {0}")]
    Yaml(#[from] serde_saphyr::ser::Error),
}

impl Failure {
    pub(crate) fn io(action: &'static str, path: &std::path::Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.display().to_string(),
            source,
        }
    }

    /// A file that the user named and that cannot be read.
    pub fn reading(path: &Path, source: io::Error) -> Self {
        Self::io("read", path, source)
    }

    /// A problem in a values file.
    pub fn values(path: &Path, problem: yaml::Problem) -> Self {
        Self::Values(path.to_owned(), problem)
    }

    /// A file that is not what it is taken for.
    pub(crate) fn bad(path: &Path, message: &str) -> Self {
        Self::File(path.to_owned(), message.to_owned())
    }
}

/// A message, and where in which file its cause is, if that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// What is wrong.
    pub message: String,
    /// The file, as the user named it.
    pub file: PathBuf,
    /// Line and column, from 1.
    pub position: Option<(usize, usize)>,
    /// The text of that line.
    pub line: String,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.position {
            None if self.file.as_os_str().is_empty() => write!(out, "{}", self.message),
            None => write!(out, "{}: {}", self.file.display(), self.message),
            Some((line, column)) => {
                writeln!(
                    out,
                    "{}:{line}:{column}: {}",
                    self.file.display(),
                    self.message
                )?;
                // Tabs stay tabs, so that the mark stands below what it marks.
                let before: String = self.line.chars().take(column - 1).collect();
                let indent: String = before
                    .chars()
                    .map(|c| if c == '\t' { '\t' } else { ' ' })
                    .collect();
                writeln!(out, "  {}", self.line)?;
                write!(out, "  {indent}^")
            }
        }
    }
}
