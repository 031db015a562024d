//! The result of a probe: one JSON object, or a matrix with notes.

use dmaflow::endpoint::{Refusal, Rung, errno_name};
use dmaflow::probe::{Held, Outcome, Tried};
use serde::Serialize;

use crate::report::RefusalReport;
use crate::table::{NONE, section};

/// What `probe --json` prints.
#[derive(Serialize, Default)]
pub struct Report {
    pub probes: Vec<PairReport>,
    /// Devices that are there and could not be opened, and why.
    pub failed: Vec<String>,
    /// Whether it was told to stop before everything was tried.
    pub stopped: bool,
}

/// A source and a sink.
#[derive(Serialize)]
pub struct PairReport {
    source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exporter: Option<String>,
    sink: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    importer: Option<String>,
    formats: Vec<FormatReport>,
    /// What failed, whatever the format.
    errors: Vec<String>,
}

#[derive(Serialize)]
struct FormatReport {
    format: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    v4l2: Option<String>,
    memory_planes: u32,
    /// Whether the sink takes it.
    shared: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    width: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    height: Option<u32>,
    /// Why the source does not deliver it.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    rungs: Vec<RungReport>,
    #[serde(skip)]
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct RungReport {
    rung: String,
    ok: bool,
    /// What the sink was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    shown: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stride: Option<Vec<u32>>,
    /// Whose memory the frames were in.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<String>,
    refusals: Vec<RefusalReport>,
}

/// A place of the matrix: a few words, and the notes that it refers to.
struct Cell {
    text: String,
    notes: Vec<String>,
}

impl Report {
    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// A line for everything that failed.
    pub fn failures(&self) -> Vec<String> {
        let of_pairs = self
            .probes
            .iter()
            .flat_map(|pair| pair.errors.iter().map(|error| format!("{}: {error}", pair.names())));
        self.failed.iter().cloned().chain(of_pairs).collect()
    }

    /// The same for people. What failed is said elsewhere.
    pub fn table(&self) -> String {
        let mut lines = Vec::new();
        for pair in &self.probes {
            if !lines.is_empty() {
                lines.push(String::new());
            }
            pair.table(&mut lines);
        }
        lines.join("\n")
    }
}

impl PairReport {
    /// A pair of which nothing is known: each a node and a driver.
    pub fn new((source, exporter): (String, Option<String>), (sink, importer): (String, Option<String>)) -> PairReport {
        PairReport { source, exporter, sink, importer, formats: Vec::new(), errors: Vec::new() }
    }

    pub fn names(&self) -> String {
        format!("{} to {}", self.source, self.sink)
    }

    pub fn fail(&mut self, error: String) {
        self.errors.push(error);
    }

    pub fn tried(&mut self, tried: &Tried) {
        let layout = tried.source.as_ref().ok();
        let (name, format) = (tried.offer.name(), tried.offer.format.to_string());
        let generic = |text: &str| without_name(&without_name(text, &name), &format);
        let error = tried.source.as_ref().err().map(|error| error.line());
        let cells = match &error {
            Some(error) => vec![Cell { text: "none".to_owned(), notes: vec![generic(error)] }],
            None => tried.rungs.iter().map(|(_, outcome)| cell(tried, outcome, &generic)).collect(),
        };
        self.formats.push(FormatReport {
            v4l2: tried.offer.code.map(|code| code.to_string()),
            memory_planes: tried.offer.memory_planes,
            shared: tried.shared,
            width: layout.map(|layout| layout.width()),
            height: layout.map(|layout| layout.height()),
            error,
            rungs: tried.rungs.iter().map(|(rung, outcome)| rung_report(*rung, outcome)).collect(),
            format: name,
            cells,
        });
    }

    fn table(&self, lines: &mut Vec<String>) {
        let of = |name: &str, driver: &Option<String>| match driver {
            Some(driver) => format!("{name} ({driver})"),
            None => name.to_owned(),
        };
        let heading = format!("{} to {}", of(&self.source, &self.exporter), of(&self.sink, &self.importer));
        let mut notes: Vec<String> = Vec::new();
        let mut rows = Vec::new();
        let titles = ["format", "size"].map(str::to_owned).into_iter();
        rows.push(titles.chain(Rung::ALL.map(|rung| rung.to_string())).collect());
        for format in &self.formats {
            let size = match (format.width, format.height) {
                (Some(width), Some(height)) => format!("{width}x{height}"),
                _ => NONE.to_owned(),
            };
            let mut row = vec![format.format.clone(), size];
            for cell in &format.cells {
                row.push(cell.with_numbers(&mut notes));
            }
            row.resize(2 + Rung::ALL.len(), NONE.to_owned());
            rows.push(row);
        }
        if self.formats.is_empty() {
            rows.clear();
        }
        section(lines, &heading, rows);
        for (index, note) in notes.iter().enumerate() {
            lines.push(format!("  [{}] {note}", index + 1));
        }
    }
}

impl Cell {
    /// The words with the numbers of the notes, which are added where they are new.
    fn with_numbers(&self, notes: &mut Vec<String>) -> String {
        let mut numbers = Vec::new();
        for note in &self.notes {
            let at = notes.iter().position(|known| known == note).unwrap_or_else(|| {
                notes.push(note.clone());
                notes.len() - 1
            });
            let number = (at + 1).to_string();
            if !numbers.contains(&number) {
                numbers.push(number);
            }
        }
        match numbers.is_empty() {
            true => self.text.clone(),
            false => format!("{} [{}]", self.text, numbers.join(" ")),
        }
    }
}

fn cell(tried: &Tried, outcome: &Outcome, generic: &dyn Fn(&str) -> String) -> Cell {
    match outcome {
        Outcome::Refused(refusals) => {
            Cell { text: "no".to_owned(), notes: refusals.iter().map(|refusal| generic(&note(refusal))).collect() }
        }
        Outcome::Holds(held) => {
            let same = held.shown.format() == tried.offer.format;
            let text = if same { "ok".to_owned() } else { format!("ok as {}", held.shown.format()) };
            Cell { text, notes: held.refused.iter().map(|refusal| generic(&but(held, refusal))).collect() }
        }
    }
}

/// Step, errno, why and repair.
fn note(refusal: &Refusal) -> String {
    let errno = refusal.errno.map_or(String::new(), |errno| format!(", {}", errno_name(errno)));
    format!("{}{errno}: {}; {}", refusal.step, refusal.why, refusal.repair)
}

/// How a rung holds that was refused first.
fn but(held: &Held, refusal: &Refusal) -> String {
    let stride = held.shown.planes().first().map_or(0, |plane| plane.stride);
    let memory = held.memory.as_deref().unwrap_or("a copier");
    format!("with rows of {stride} bytes in memory of {memory}; before, {}", note(refusal))
}

/// The same text for every format: its name gives way to "the format".
fn without_name(text: &str, name: &str) -> String {
    let words = text.split(' ').map(|word| {
        let bare = word.trim_end_matches([';', ',', ':', '.', ')']);
        if bare == name { format!("the format{}", &word[bare.len()..]) } else { word.to_owned() }
    });
    words.collect::<Vec<_>>().join(" ")
}

fn rung_report(rung: Rung, outcome: &Outcome) -> RungReport {
    let held = match outcome {
        Outcome::Holds(held) => Some(held),
        Outcome::Refused(_) => None,
    };
    RungReport {
        rung: rung.to_string(),
        ok: outcome.holds(),
        shown: held.map(|held| held.shown.format().to_string()),
        stride: held.map(|held| held.shown.planes().iter().map(|plane| plane.stride).collect()),
        memory: held.and_then(|held| held.memory.clone()),
        refusals: outcome.refusals().iter().map(RefusalReport::from).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_shared_and_numbered() {
        let mut notes = Vec::new();
        let cell = |notes: &[&str]| Cell {
            text: "no".to_owned(),
            notes: notes.iter().map(|note| (*note).to_owned()).collect(),
        };
        assert_eq!(cell(&["a", "b", "a"]).with_numbers(&mut notes), "no [1 2]");
        assert_eq!(cell(&["b"]).with_numbers(&mut notes), "no [2]");
        assert_eq!(cell(&[]).with_numbers(&mut notes), "no");
        assert_eq!(notes, ["a", "b"]);
    }

    #[test]
    fn a_format_name_gives_way_where_it_is_a_word() {
        assert_eq!(
            without_name("scans out NV12; take NV12, NV21", "NV12"),
            "scans out the format; take the format, NV21"
        );
        assert_eq!(without_name("NV12x NM12", "NV12"), "NV12x NM12");
    }
}
