//! The result of a pipe: one JSON object, or a table.

use dmaflow::endpoint::{Refusal, Verdict, errno_name};
use dmaflow::format::Layout;
use dmaflow::ladder::ByGpu;
use dmaflow::ledger::Ledger;
use dmaflow::pipe::Account;
use serde::Serialize;

/// What `pipe --json` prints. Numbers that were not measured are left out.
#[derive(Serialize)]
pub struct Report {
    source: String,
    sink: String,
    format: String,
    width: u32,
    height: u32,
    stride: Vec<u32>,
    memory_planes: usize,
    /// Frames a second that the source agreed to.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<GpuReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(flatten)]
    flow: Option<Flow>,
    refusals: Vec<RefusalReport>,
}

/// The GPU that took part, and what it read.
#[derive(Serialize)]
struct GpuReport {
    name: String,
    /// Whether the CPU does its work.
    software: bool,
    /// Why it reads each colour plane as an image of its own, where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    planes_apart: Option<String>,
    /// Of the newest frames, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    checksums: Vec<ChecksumReport>,
}

#[derive(Serialize)]
struct ChecksumReport {
    sequence: u32,
    checksum: String,
}

#[derive(Serialize)]
struct Flow {
    buffers: usize,
    frames: Frames,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    fps: Option<f64>,
    imports: u64,
    bytes_copied: u64,
    copies: Vec<CopiesReport>,
    moves: Vec<MoveReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_us_per_frame: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_us: Option<LatencyReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    verify: Option<VerifyReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fences: Option<FencesReport>,
}

#[derive(Serialize)]
struct Frames {
    captured: u64,
    presented: u64,
    dropped_by_camera: u64,
    /// Those of them that may have been lost for want of a buffer.
    starved: u64,
    /// Of what is shared: what this program was too late for.
    skipped: u64,
    dropped_by_display: u64,
    errored: u64,
    /// The camera may have dropped more, at the end, than could be counted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    more_dropped_by_camera: bool,
}

#[derive(Serialize)]
struct CopiesReport {
    cause: &'static str,
    count: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct MoveReport {
    /// How many frames had been captured before.
    frame: u64,
    from: String,
    to: String,
    why: String,
}

#[derive(Serialize)]
pub struct LatencyReport {
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
    /// How many frames were measured.
    pub measured: u64,
}

#[derive(Serialize)]
struct FencesReport {
    by_device: u64,
    by_cpu: u64,
    /// Whose work has failed.
    failed: u64,
    /// That took too long, and cost a frame.
    late: u64,
    /// Why not all by the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

#[derive(Serialize)]
struct VerifyReport {
    checked: u64,
    wrong: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_wrong: Option<WrongFrame>,
}

#[derive(Serialize)]
struct WrongFrame {
    /// Its place among the captured, from 0.
    frame: u64,
    sequence: u32,
}

/// A refusal in JSON.
#[derive(Serialize)]
pub struct RefusalReport {
    rung: String,
    step: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<String>,
    why: String,
    repair: String,
}

impl From<&Refusal> for RefusalReport {
    fn from(refusal: &Refusal) -> RefusalReport {
        RefusalReport {
            rung: refusal.rung.to_string(),
            step: refusal.step,
            errno: refusal.errno.map(errno_name),
            why: refusal.why.clone(),
            repair: refusal.repair.clone(),
        }
    }
}

/// What a sink says at the end of a pipe.
pub struct SinkSays<'a> {
    pub imports: u64,
    pub ledger: &'a Ledger,
    pub verdict: Option<Verdict>,
}

impl Report {
    pub fn new(source: &str, sink: &str, layout: &Layout) -> Report {
        let mut report = Report {
            source: source.to_owned(),
            sink: sink.to_owned(),
            format: String::new(),
            width: 0,
            height: 0,
            stride: Vec::new(),
            memory_planes: 0,
            rate: None,
            mode: None,
            gpu: None,
            path: None,
            flow: None,
            refusals: Vec::new(),
        };
        report.shaped(layout);
        report
    }

    /// What the source's frames are like now: the ladder may have agreed on other strides, the source may have changed.
    pub fn shaped(&mut self, layout: &Layout) {
        self.format = layout.format().to_string();
        (self.width, self.height) = layout.size();
        self.stride = layout.planes().iter().map(|plane| plane.stride).collect();
        self.memory_planes = layout.memory_planes();
    }

    /// What the source says of its rate, which its driver may have rounded.
    pub fn rated(&mut self, rate: Option<f64>) {
        self.rate = rate.map(|rate| round(rate, 1e3));
    }

    pub fn refuse(&mut self, refusal: &Refusal) {
        self.refusals.push(RefusalReport::from(refusal));
    }

    pub fn joined(&mut self, mode: Option<String>) {
        self.mode = mode;
    }

    /// The GPU that reads the frames, and the checksums of the newest.
    #[cfg(feature = "vulkan")]
    pub fn read_by(&mut self, vulkan: &dmaflow::vulkan::Vulkan) {
        let info = vulkan.gpu().info();
        let checksum = |found: &dmaflow::vulkan::Checksum| ChecksumReport {
            sequence: found.meta.sequence,
            checksum: format!("{:#010x}", found.checksum),
        };
        let checksums = vulkan.checksums().map(checksum).collect();
        let planes_apart = vulkan.planes_apart().map(|refusal| refusal.why.clone());
        self.gpu = Some(GpuReport { name: info.name.clone(), software: info.is_software(), planes_apart, checksums });
    }

    pub fn flowed(&mut self, account: &Account, sink: &SinkSays<'_>, buffers: usize) {
        let latency = &account.latency;
        account.refusals.iter().for_each(|refusal| self.refuse(refusal));
        let mut copies = sink.ledger.clone();
        account.copies.entries().iter().for_each(|copied| copies.add(copied));
        if let Some(ByGpu { name, software }) = account.gpu.clone() {
            // Of a sink that is a GPU it is the same, and what that has read is said already.
            self.gpu
                .get_or_insert_with(|| GpuReport { name, software, planes_apart: None, checksums: Vec::new() });
        }
        self.path = Some(account.rung.to_string());
        self.flow = Some(Flow {
            buffers,
            frames: Frames {
                captured: account.captured,
                presented: account.presented,
                dropped_by_camera: account.lost.dropped,
                starved: account.lost.starved,
                skipped: account.lost.skipped,
                dropped_by_display: account.dropped_by_sink,
                errored: account.lost.errored,
                more_dropped_by_camera: account.lost.uncounted,
            },
            seconds: round(account.duration.as_secs_f64(), 1e6),
            fps: account.fps.map(|fps| round(fps, 1e2)),
            imports: sink.imports,
            bytes_copied: copies.bytes(),
            copies: copies
                .entries()
                .iter()
                .map(|copies| CopiesReport { cause: copies.cause, count: copies.count, bytes: copies.bytes })
                .collect(),
            moves: account
                .moves
                .iter()
                .map(|step| MoveReport {
                    frame: step.frame,
                    from: step.from.to_string(),
                    to: step.to.to_string(),
                    why: step.why.clone(),
                })
                .collect(),
            cpu_us_per_frame: account
                .cpu
                .filter(|_| account.presented > 0)
                .map(|cpu| round(cpu.as_secs_f64() * 1e6 / account.presented as f64, 1e3)),
            latency_us: (|| {
                let at = |quantile| latency.quantile(quantile);
                Some(LatencyReport { p50: at(0.5)?, p99: at(0.99)?, max: at(1.0)?, measured: latency.count() })
            })(),
            verify: verdict(account, sink).map(|verdict| VerifyReport {
                checked: verdict.checked,
                wrong: verdict.wrong,
                first_wrong: verdict.first_wrong.map(|(frame, sequence)| WrongFrame { frame, sequence }),
            }),
            fences: (!account.fences.is_none()).then(|| FencesReport {
                by_device: account.fences.by_device,
                by_cpu: account.fences.by_cpu,
                failed: account.fences.failed,
                late: account.fences.late,
                why: account.fences.why.map(|why| why.to_string()),
            }),
        });
    }

    pub fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// The same for people.
    pub fn table(&self) -> String {
        let mut rows: Vec<(&str, String)> = Vec::new();
        let mode = self.mode.as_deref().map_or(String::new(), |mode| format!(" on {mode}"));
        rows.push(("from", self.source.clone()));
        rows.push(("to", format!("{}{mode}", self.sink)));
        rows.push(("format", format!("{} {}x{}", self.format, self.width, self.height)));
        if let (Some(path), Some(flow)) = (&self.path, &self.flow) {
            let copied = match flow.bytes_copied {
                0 => "no byte copied".to_owned(),
                bytes => format!("{bytes} bytes copied"),
            };
            rows.push(("path", format!("{path}, {copied}, {} imports for {} buffers", flow.imports, flow.buffers)));
            for copy in &flow.copies {
                rows.push(("copies", format!("{} of {} bytes: {}", copy.count, copy.bytes, copy.cause)));
            }
            let Frames { captured, presented, dropped_by_camera, skipped, dropped_by_display, errored, .. } =
                flow.frames;
            let more = want_of_buffers(flow.frames.starved, flow.frames.more_dropped_by_camera);
            let skipped = if skipped == 0 { String::new() } else { format!(", {skipped} skipped for being late") };
            rows.push((
                "frames",
                format!(
                    "{captured} captured, {presented} shown, {dropped_by_camera} dropped by the camera{more}{skipped}, \
                     {dropped_by_display} by the display, {errored} damaged"
                ),
            ));
            let fps = flow.fps.map_or(String::new(), |fps| format!(", {fps:.1} a second"));
            rows.push(("time", format!("{:.2} s{fps}", flow.seconds)));
            if let Some(cpu) = flow.cpu_us_per_frame {
                rows.push(("cpu", format!("{cpu:.0} µs a frame")));
            }
            if let Some(LatencyReport { p50, p99, max, measured }) = &flow.latency_us {
                // Not of a frame that is stamped with a time to come, as vivid does: there is none.
                let of = if *measured < presented { format!(", of {measured} frames") } else { String::new() };
                rows.push(("latency", format!("{p50} µs median, {p99} µs for 99 %, {max} µs at most{of}")));
            }
            if let Some(verify) = &flow.verify {
                let wrong = verify.first_wrong.as_ref().map_or(String::new(), |first| {
                    format!(", the first is frame {} (sequence {})", first.frame, first.sequence)
                });
                rows.push(("verify", format!("{} checked, {} wrong{wrong}", verify.checked, verify.wrong)));
            }
        }
        if let Some(GpuReport { name, software, checksums, .. }) = &self.gpu {
            let software = if *software { ", in software" } else { "" };
            rows.push(("gpu", format!("{name}{software}")));
            if let Some(newest) = checksums.last() {
                rows.push((
                    "checksum",
                    format!("{} of the newest frame (sequence {})", newest.checksum, newest.sequence),
                ));
            }
        }
        if let Some(fences) = self.flow.as_ref().and_then(|flow| flow.fences.as_ref()) {
            let FencesReport { by_device, by_cpu, failed, late, why } = fences;
            let why = why.as_ref().map_or(String::new(), |why| format!(" ({why})"));
            rows.push((
                "fences",
                format!(
                    "{by_device} waited for by the display, {by_cpu} by the CPU{why}, {failed} failed, {late} too late"
                ),
            ));
        }
        for step in self.flow.iter().flat_map(|flow| &flow.moves) {
            rows.push(("moved", format!("after {} frames, {} to {}: {}", step.frame, step.from, step.to, step.why)));
        }
        for refusal in &self.refusals {
            rows.push((
                "refused",
                format!("{} at {}: {}; {}", refusal.rung, refusal.step, refusal.why, refusal.repair),
            ));
        }
        rows.iter()
            .map(|(name, value)| format!("{name:8} {value}"))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// What was shown wrong, and what was copied wrong.
pub fn verdict(account: &Account, sink: &SinkSays<'_>) -> Option<Verdict> {
    let shown = sink.verdict?;
    let copied = account.copies_verdict.unwrap_or_default();
    let first_wrong = [shown.first_wrong, copied.first_wrong].into_iter().flatten().min();
    Some(Verdict { checked: shown.checked, wrong: shown.wrong + copied.wrong, first_wrong })
}

/// What goes with the number of frames that a camera dropped: how many of them for want of a buffer, and whether there may be more at the end.
pub fn want_of_buffers(starved: u64, more: bool) -> String {
    match (starved, more) {
        (0, false) => String::new(),
        (0, true) => " (and at the end, for want of a buffer, an unknown number)".to_owned(),
        (starved, false) => format!(" ({starved} of them for want of a buffer)"),
        (starved, true) => format!(" ({starved} of them for want of a buffer, and at the end an unknown number more)"),
    }
}

fn round(value: f64, scale: f64) -> f64 {
    (value * scale).round() / scale
}
