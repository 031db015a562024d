//! What `dmaflow bufs` prints: one JSON object, or a table.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use dmaflow::bufs::{self, Growth, Inventory, Listed, Measure, Subject, Totals, Unseen, Watch};
use serde::Serialize;

use crate::table::{NONE, UNKNOWN, count, duration, plain, section, size};

/// What `bufs --json` prints. What is not known is left out.
#[derive(Serialize)]
pub struct Report {
    /// Seconds since the first look; only with --watch, as are `only_grows` and `seen_seconds`.
    #[serde(skip_serializing_if = "Option::is_none")]
    watched_seconds: Option<f64>,
    total: SumReport,
    /// Buffers that no process holds, as far as processes could be looked at.
    unheld: SumReport,
    /// How many buffers have no known size, and are in no sum of bytes.
    unknown_sizes: u64,
    exporters: Vec<ExporterReport>,
    processes: Vec<ProcessReport>,
    buffers: Vec<BufferReport>,
    unseen: UnseenReport,
}

#[derive(Serialize)]
struct SumReport {
    buffers: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct ExporterReport {
    #[serde(skip_serializing_if = "Option::is_none")]
    exporter: Option<String>,
    #[serde(flatten)]
    sum: SumReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    only_grows: Option<Vec<GrowthReport>>,
}

#[derive(Serialize)]
struct ProcessReport {
    pid: i32,
    name: String,
    #[serde(flatten)]
    sum: SumReport,
    /// The bytes of each of its buffers, divided by the number of processes that hold it.
    share_bytes: u64,
    fds: u64,
    maps: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    only_grows: Option<Vec<GrowthReport>>,
}

#[derive(Serialize)]
struct GrowthReport {
    what: &'static str,
    from: u64,
    to: u64,
    /// At how many looks it was more than at the one before.
    times: u32,
    seconds: f64,
}

#[derive(Serialize)]
struct BufferReport {
    inode: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exporter: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// Seconds since it was exported.
    #[serde(skip_serializing_if = "Option::is_none")]
    age_seconds: Option<f64>,
    /// Seconds since --watch saw it first.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    references: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    devices: Option<Vec<String>>,
    holders: Vec<HolderReport>,
}

#[derive(Serialize)]
struct HolderReport {
    pid: i32,
    name: String,
    fds: Vec<i32>,
    maps: Vec<MapReport>,
}

#[derive(Serialize)]
struct MapReport {
    offset: u64,
    bytes: u64,
    access: String,
}

#[derive(Serialize)]
struct UnseenReport {
    processes: Vec<UnseenProcess>,
    #[serde(skip_serializing_if = "Option::is_none")]
    debugfs: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    proc: Option<String>,
}

#[derive(Serialize)]
struct UnseenProcess {
    pid: i32,
    name: String,
    why: String,
}

/// What looking again and again has told.
pub struct Watched<'a> {
    pub watch: &'a Watch,
    /// The moment of the last look.
    pub now: Instant,
    /// The moment of the first.
    pub since: Instant,
}

impl Report {
    pub fn new(inventory: &Inventory, totals: &Totals, watched: Option<&Watched<'_>>, clock: SystemTime) -> Report {
        let grows = |subject: &Subject| {
            let Watched { watch, now, .. } = watched?;
            Some(watch.growths(subject, *now).iter().map(GrowthReport::new).collect())
        };
        let exporters = totals.exporters.iter().map(|found| ExporterReport {
            exporter: found.exporter.clone(),
            sum: SumReport::new(found.sum),
            only_grows: grows(&Subject::Exporter(found.exporter.clone())),
        });
        let processes = totals.processes.iter().map(|found| ProcessReport {
            pid: found.process.pid,
            name: found.process.name.clone(),
            sum: SumReport::new(found.sum),
            share_bytes: found.share,
            fds: found.fds,
            maps: found.maps,
            only_grows: grows(&Subject::process(&found.process)),
        });
        let unseen = &inventory.unseen;
        let hidden = unseen.processes.iter();
        Report {
            watched_seconds: watched.map(|watched| seconds(watched.now.saturating_duration_since(watched.since))),
            total: SumReport::new(totals.all),
            unheld: SumReport::new(totals.unheld),
            unknown_sizes: totals.unsized_buffers,
            exporters: exporters.collect(),
            processes: processes.collect(),
            buffers: inventory
                .buffers
                .iter()
                .map(|listed| BufferReport::new(listed, watched, clock))
                .collect(),
            unseen: UnseenReport {
                processes: hidden
                    .map(|(process, why)| UnseenProcess {
                        pid: process.pid,
                        name: process.name.clone(),
                        why: why.clone(),
                    })
                    .collect(),
                debugfs: unseen.debugfs.clone(),
                proc: unseen.proc.clone(),
            },
        }
    }

    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub fn watched_seconds(&self) -> f64 {
        self.watched_seconds.unwrap_or(0.0)
    }

    /// A line for each buffer, by inode.
    pub fn buffer_lines(&self) -> BTreeMap<u64, String> {
        let line = |buffer: &BufferReport| {
            let cells = buffer.cells(self.sees_all());
            let named = ["inode", "", "age", "", "name", "devices", "held by"].into_iter().zip(cells);
            let shown = named
                .filter(|(_, cell)| cell != NONE)
                .map(|(name, cell)| format!("{name} {cell}"));
            let shown: Vec<_> = shown.map(|part| part.trim().to_owned()).collect();
            (buffer.inode, shown.join("  "))
        };
        self.buffers.iter().map(line).collect()
    }

    /// Who only grows, and how.
    pub fn growing(&self) -> BTreeMap<String, String> {
        let exporters = self.exporters.iter().map(|found| (found.title(), &found.only_grows));
        let processes = self.processes.iter().map(|found| (found.title(), &found.only_grows));
        exporters
            .chain(processes)
            .filter_map(|(who, grows)| Some((who, growth(grows.as_ref())?)))
            .collect()
    }

    /// The same for people, line by line.
    pub fn table(&self) -> Vec<String> {
        let unknown = match self.unknown_sizes {
            0 => String::new(),
            count => format!(", and {count} of unknown size"),
        };
        let whole =
            if self.sees_all() && self.unseen.debugfs.is_none() { "" } else { " (of those that could be seen)" };
        let dma_bufs = count(self.total.buffers, "dma-buf");
        let mut lines = vec![format!("{dma_bufs}, {}{unknown}{whole}", size(self.total.bytes))];
        let mark = |grows: &Option<Vec<GrowthReport>>| {
            growth(grows.as_ref()).map_or(String::new(), |how| format!("ONLY GROWS: {how}"))
        };
        let rows = self.exporters.iter().map(|found| {
            vec![found.title(), count(found.sum.buffers, "buffer"), size(found.sum.bytes), mark(&found.only_grows)]
        });
        section(&mut lines, "exporters", rows.collect());
        let mut rows: Vec<_> = self.processes.iter().map(ProcessReport::cells).collect();
        for (row, found) in rows.iter_mut().zip(&self.processes) {
            row.push(mark(&found.only_grows));
        }
        if self.unheld.buffers > 0 {
            let who = if self.sees_all() { "no process" } else { "no process seen" };
            rows.push(vec![who.into(), count(self.unheld.buffers, "buffer"), size(self.unheld.bytes)]);
        }
        section(&mut lines, "processes", rows);
        let mut rows = Vec::new();
        if !self.buffers.is_empty() {
            rows.push(
                ["inode", "size", "age", "exporter", "name", "devices", "held by"]
                    .map(str::to_owned)
                    .to_vec(),
            );
        }
        rows.extend(self.buffers.iter().map(|buffer| buffer.cells(self.sees_all()).to_vec()));
        section(&mut lines, "buffers", rows);
        lines
    }

    /// Whether a buffer without a holder is one that no process holds.
    fn sees_all(&self) -> bool {
        self.unseen.processes.is_empty() && self.unseen.proc.is_none()
    }
}

impl SumReport {
    fn new(sum: bufs::Sum) -> SumReport {
        SumReport { buffers: sum.buffers, bytes: sum.bytes }
    }
}

impl ExporterReport {
    fn title(&self) -> String {
        self.exporter.as_deref().map_or(UNKNOWN.to_owned(), plain)
    }
}

impl ProcessReport {
    fn title(&self) -> String {
        format!("{} {}", self.pid, plain(&self.name))
    }

    fn cells(&self) -> Vec<String> {
        let share = match self.share_bytes == self.sum.bytes {
            true => String::new(),
            false => format!(", share {}", size(self.share_bytes)),
        };
        vec![
            self.title(),
            count(self.sum.buffers, "buffer"),
            format!("{}{share}", size(self.sum.bytes)),
            format!("{}, {}", count(self.fds, "fd"), count(self.maps, "map")),
        ]
    }
}

impl GrowthReport {
    fn new(growth: &Growth) -> GrowthReport {
        let what = match growth.measure {
            Measure::Buffers => "buffers",
            Measure::Bytes => "bytes",
            Measure::Fds => "fds",
        };
        let Growth { from, to, times, over, .. } = *growth;
        GrowthReport { what, from, to, times, seconds: seconds(over) }
    }
}

impl BufferReport {
    fn new(listed: &Listed, watched: Option<&Watched<'_>>, clock: SystemTime) -> BufferReport {
        let holder = |holder: &bufs::Holder| HolderReport {
            pid: holder.process.pid,
            name: holder.process.name.clone(),
            fds: holder.fds.clone(),
            maps: holder
                .maps
                .iter()
                .map(|map| MapReport { offset: map.offset, bytes: map.bytes, access: map.access.clone() })
                .collect(),
        };
        let seen = watched.and_then(|watched| watched.watch.seen_for(listed.inode, watched.now));
        BufferReport {
            inode: listed.inode,
            size: listed.size,
            exporter: listed.exporter.clone(),
            name: listed.name.clone(),
            age_seconds: listed.age(clock).map(seconds),
            seen_seconds: seen.map(seconds),
            references: listed.references,
            devices: listed.devices.clone(),
            holders: listed.holders.iter().map(holder).collect(),
        }
    }

    fn cells(&self, sees_all: bool) -> [String; 7] {
        let unknown = || UNKNOWN.to_owned();
        let devices = self.devices.as_ref().map_or_else(unknown, |devices| match devices.as_slice() {
            [] => NONE.to_owned(),
            devices => devices.iter().map(|device| plain(device)).collect::<Vec<_>>().join(" "),
        });
        let holders: Vec<_> = self.holders.iter().map(HolderReport::cell).collect();
        let nobody = || if sees_all { "no process" } else { "no process seen" }.to_owned();
        [
            self.inode.to_string(),
            self.size.map_or_else(unknown, size),
            self.age_seconds.map_or_else(unknown, duration),
            self.exporter.as_deref().map_or_else(unknown, plain),
            self.name.as_deref().map_or(NONE.to_owned(), plain),
            devices,
            if holders.is_empty() { nobody() } else { holders.join("; ") },
        ]
    }
}

impl HolderReport {
    fn cell(&self) -> String {
        const SHOWN: usize = 4;
        let mut how = Vec::new();
        let fds: Vec<_> = self.fds.iter().take(SHOWN).map(i32::to_string).collect();
        match self.fds.len() {
            0 => {}
            1 => how.push(format!("fd {}", fds.join(" "))),
            all if all > SHOWN => how.push(format!("fds {} and {} more", fds.join(" "), all - SHOWN)),
            _ => how.push(format!("fds {}", fds.join(" "))),
        }
        if !self.maps.is_empty() {
            how.push(count(self.maps.len() as u64, "map"));
        }
        format!("{} {} ({})", self.pid, plain(&self.name), how.join(", "))
    }
}

/// What could not be seen, a line each.
pub fn unseen(unseen: &Unseen) -> Vec<String> {
    const NAMED: usize = 3;
    let mut lines = Vec::new();
    let mut by_why: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (process, why) in &unseen.processes {
        by_why
            .entry(why)
            .or_default()
            .push(format!("{} {}", process.pid, plain(&process.name)));
    }
    for (why, names) in by_why {
        let more = match names.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
        let hold = if names.len() == 1 { "process holds" } else { "processes hold" };
        lines.push(format!("not seen: what {} {hold} ({named}{more}): {why}", names.len()));
    }
    if let Some(why) = &unseen.proc {
        lines.push(format!("not seen: other users' processes: {why}"));
    }
    if let Some(why) = &unseen.debugfs {
        lines.push(format!("not seen: attached devices, and buffers that no process holds: {why}"));
    }
    lines
}

fn growth(grows: Option<&Vec<GrowthReport>>) -> Option<String> {
    let parts: Vec<_> = grows?
        .iter()
        .map(|growth| match growth.what {
            "bytes" => format!("{} to {}", size(growth.from), size(growth.to)),
            what => format!("{} to {} {what}", growth.from, growth.to),
        })
        .collect();
    let longest = grows?.iter().map(|growth| growth.seconds).fold(0.0, f64::max);
    (!parts.is_empty()).then(|| format!("{} in {}", parts.join(", "), duration(longest)))
}

/// To the millisecond.
fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmaflow::bufs::{Holder, Map, Process};

    fn inventory() -> Inventory {
        let process = Process { pid: 12, start: 5, name: "a b\n\x1b[2J".into() };
        let maps = vec![Map { offset: 0, bytes: 4096, access: "rw-s".into() }];
        let held = Listed {
            inode: 7,
            size: Some(921_600),
            exporter: Some("videobuf2_vmalloc".into()),
            name: Some("x\ny\u{202e}".into()),
            devices: Some(vec!["vkms".into()]),
            made: Some(SystemTime::UNIX_EPOCH),
            holders: vec![Holder { process, fds: vec![3, 4, 5, 6, 7], maps }],
            ..Listed::default()
        };
        let other = Listed { inode: 8, ..Listed::default() };
        Inventory { buffers: vec![held, other], ..Inventory::default() }
    }

    #[test]
    fn a_name_stays_in_its_line() {
        let inventory = inventory();
        let clock = SystemTime::UNIX_EPOCH + Duration::from_millis(2500);
        let table = Report::new(&inventory, &Totals::of(&inventory), None, clock).table();
        assert!(table.iter().all(|line| !line.contains(char::is_control)), "{table:?}");
        let words: Vec<_> = table
            .iter()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let held = "7 900.0 KiB 2.5 s videobuf2_vmalloc x\\ny\\u{202e} vkms \
                    12 a b\\n\\u{1b}[2J (fds 3 4 5 6 and 1 more, 1 map)";
        assert!(words.contains(&held.to_owned()), "{table:#?}");
        assert!(words.contains(&"8 ? ? ? - ? no process".to_owned()), "{table:#?}");
        assert_eq!(table[0], "2 dma-bufs, 900.0 KiB, and 1 of unknown size");
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let inventory = inventory();
        let report = Report::new(&inventory, &Totals::of(&inventory), None, SystemTime::UNIX_EPOCH);
        let value: serde_json::Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(value["buffers"][0]["name"], "x\ny\u{202e}");
        let unknown = value["buffers"][1].as_object().unwrap();
        assert_eq!(unknown.keys().collect::<Vec<_>>(), ["holders", "inode"]);
        assert!(value.get("watched_seconds").is_none() && value["exporters"][0].get("only_grows").is_none());
    }

    #[test]
    fn what_could_not_be_seen_is_a_line_for_each_cause() {
        let process = |pid| (Process { pid, start: 0, name: "x".into() }, "Permission denied".to_owned());
        let hidden =
            Unseen { processes: (1..=5).map(process).collect(), debugfs: Some("it is not mounted".into()), proc: None };
        assert_eq!(
            unseen(&hidden),
            [
                "not seen: what 5 processes hold (1 x, 2 x, 3 x and 2 more): Permission denied",
                "not seen: attached devices, and buffers that no process holds: it is not mounted"
            ]
        );
        assert!(unseen(&Unseen::default()).is_empty());
    }
}
