//! `probe`: what holds and what is refused between vivid and vkms, and that both are afterwards as before.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::capture::Shattered;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::ladder::MAKERS;
use crate::modules::{self, Witness};
use crate::process::{State, dmaflow, finish, pipe, sh, start};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "probe::every_rung_of_every_format", needs: NEEDS, seconds: 240, run: every_rung },
    Test { name: "probe::without_arguments", needs: NEEDS, seconds: 480, run: without_arguments },
    Test { name: "probe::contiguous_memory", needs: NEEDS, seconds: 240, run: contiguous_memory },
    Test { name: "probe::the_pattern", needs: &["vkms", "udmabuf"], seconds: 240, run: the_pattern },
    Test { name: "probe::what_it_cannot_have", needs: NEEDS, seconds: 120, run: what_it_cannot_have },
    Test { name: "probe::without_devices", needs: &["vivid", "vkms", "root"], seconds: 120, run: without_devices },
    Test { name: "probe::an_order_to_stop", needs: NEEDS, seconds: 120, run: an_order_to_stop },
];

/// What the camera is set to: format and rate.
fn settings() -> Result<String> {
    sh("v4l2-ctl -d /dev/video0 --get-fmt-video --get-parm")
}

/// One rung of one format of the only pair.
fn rung<'a>(result: &'a Value, format: &str, rung: &str) -> Result<&'a Value> {
    let formats = result["probes"][0]["formats"].as_array().context("formats")?;
    let format = formats
        .iter()
        .find(|entry| entry["format"] == format)
        .context(format.to_owned())?;
    let rungs = format["rungs"].as_array().context("rungs")?;
    rungs.iter().find(|entry| entry["rung"] == rung).context(rung.to_owned())
}

fn holds(result: &Value, format: &str, name: &str) -> Result<()> {
    let found = rung(result, format, name)?;
    ensure!(found["ok"] == true, "{format} {name}: {found}");
    Ok(())
}

/// Refused, and the reasons name all of `words`.
fn refused(result: &Value, format: &str, name: &str, words: &[&str]) -> Result<()> {
    let found = rung(result, format, name)?;
    let reasons = found["refusals"].as_array().context("refusals")?;
    ensure!(found["ok"] == false && !reasons.is_empty(), "{format} {name}: {found}");
    for reason in reasons {
        let has = |key: &str| reason[key].as_str().is_some_and(|text| !text.is_empty());
        ensure!(has("step") && has("why") && has("repair"), "{reason}");
    }
    for word in words {
        ensure!(found.to_string().contains(word), "{format} {name}: no {word:?} in {found}");
    }
    Ok(())
}

fn every_rung() -> anyhow::Result<Outcome> {
    // Another size, rate and format than a probe would choose.
    sh("v4l2-ctl -d /dev/video0 -v width=320,height=180,pixelformat=UYVY -p 30")?;
    let _witness = Witness::new()?;
    let (settings_before, before) = (settings()?, State::read());
    let run = finish(&mut dmaflow("probe --from vivid --to vkms --json"))?;
    let result = run.json(0)?;
    ensure!(run.stderr.is_empty(), "{}", run.stderr);
    before.is_back()?;
    ensure!(settings()? == settings_before, "{} instead of {settings_before}", settings()?);
    ensure!(result["stopped"] == false && result["failed"] == Value::Array(vec![]), "{result}");
    let pair = &result["probes"][0];
    ensure!(pair["exporter"] == "vivid" && pair["importer"] == "vkms" && pair["source"] == "/dev/video0", "{pair}");
    for format in ["XR24", "AR24", "RG16"] {
        for rung in ["exported", "reverse", "copied"] {
            holds(&result, format, rung)?;
        }
        ensure!(rung(&result, format, "copied")?["shown"] == format, "{format} is copied as another one");
    }
    ensure!(rung(&result, "XR24", "exported")?["memory"] == "/dev/video0", "{result}");
    for rung in ["exported", "reverse"] {
        refused(&result, "YUYV", rung, &["plane formats", "no plane of", "YUYV", "XR24"])?;
    }
    refused(&result, "XR24", "converted", &["GPU"])?;
    holds(&result, "YUYV", "copied")?;
    ensure!(rung(&result, "YUYV", "copied")?["shown"] == "XR24", "{result}");
    match modules::kernel() {
        (6, _) => refused(&result, "NV12", "exported", &["no plane of", "NV12"])?,
        _ => ["exported", "reverse"]
            .iter()
            .try_for_each(|rung| holds(&result, "NV12", rung))?,
    }
    holds(&result, "NV12", "copied")?;
    // Everything that the camera has and that is known, those that the display takes first, each tried on each rung.
    let formats = pair["formats"].as_array().context("formats")?;
    ensure!(formats.len() > 20, "{} formats", formats.len());
    ensure!(formats.is_sorted_by_key(|format| format["shared"] != true), "{pair}");
    for format in formats {
        ensure!(format["rungs"].as_array().is_some_and(|rungs| rungs.len() == 4), "{format}");
        ensure!(format["width"] == 320 && format["height"] == 180, "{format}");
    }
    PASSED
}

fn without_arguments() -> anyhow::Result<Outcome> {
    let run = finish(&mut dmaflow("probe"))?;
    run.has_status(0)?;
    let card = modules::card()?.display().to_string();
    for word in [&format!("/dev/video0 (vivid) to {card} (vkms)"), "exported  reverse", "ok as XR24", "[1] "] {
        ensure!(run.stdout.contains(word), "no {word:?} in:\n{}", run.stdout);
    }
    let row = run
        .stdout
        .lines()
        .find(|line| line.trim_start().starts_with("XR24 "))
        .context("XR24")?;
    let cells: Vec<_> = row.split_whitespace().collect();
    ensure!(cells == ["XR24", "640x360", "ok", "ok", "no", "[1]", "ok"], "{row}");
    // Every display, and GBM.
    let gbm = run.stdout.contains("/dev/video0 (vivid) to gbm:/dev/dri/");
    ensure!(gbm == cfg!(feature = "gbm"), "{}", run.stdout);
    PASSED
}

/// A device that wants contiguous memory refuses what is not, and its own is shown.
fn contiguous_memory() -> anyhow::Result<Outcome> {
    modules::vivid(&["allocators=1"])?;
    let shattered = Shattered::new()?;
    let result = finish(&mut dmaflow("probe --from vivid --to vkms --size 640x360 --json"))?.json(0);
    drop(shattered);
    modules::reload()?;
    let result = result?;
    let mut reasons = Vec::new();
    for format in ["XR24", "AR24", "RG16"] {
        holds(&result, format, "exported")?;
        holds(&result, format, "copied")?;
        let reverse = rung(&result, format, "reverse")?;
        let refusals = reverse["refusals"].as_array().context("refusals")?;
        // Of these makers one may have had contiguous memory by chance.
        ensure!(refusals.len() == MAKERS || reverse["ok"] == true, "{format}: {reverse}");
        reasons.extend(refusals.iter().map(Value::to_string));
    }
    ensure!(!reasons.is_empty(), "nothing was refused: {result}");
    for reason in &reasons {
        for word in ["VIDIOC_PREPARE_BUF", "EFAULT", "contiguous", "the camera's own buffers", "with buffers of"] {
            ensure!(reason.contains(word), "no {word:?} in {reason}");
        }
    }
    note(&format!("{} refusals of others' memory", reasons.len()));
    PASSED
}

fn the_pattern() -> anyhow::Result<Outcome> {
    let run = finish(&mut dmaflow("probe --from pattern --to vkms --size 320x180 --json"))?;
    let result = run.json(0)?;
    for rung in ["exported", "reverse", "copied"] {
        holds(&result, "XR24", rung)?;
    }
    // Nobody reads the frames, so every rung without a copy holds.
    let result = finish(&mut dmaflow("probe --from vivid --to null --json"))?.json(0)?;
    holds(&result, "YUYV", "exported")?;
    for options in ["probe --to png:x.png", "probe --from unix:/x", "probe --size 5", "probe vivid"] {
        finish(&mut dmaflow(options))?
            .has_status(2)
            .with_context(|| options.to_owned())?;
    }
    PASSED
}

/// A display that another process drives, a camera that another one uses, and a user who may have neither.
fn what_it_cannot_have() -> anyhow::Result<Outcome> {
    let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
    running.wait_until_it_shows()?;
    let display = finish(&mut dmaflow("probe --to vkms --json"));
    let camera = finish(&mut dmaflow("probe --from vivid --to null --json"));
    let both = finish(&mut dmaflow("probe --from nosuch"));
    let pid = format!("(pid {})", running.pid());
    running.signal(Signal::SIGINT)?;
    running.end()?.has_status(0)?;
    let display = display?;
    let result = display.json(1)?;
    display.one_line(1, &["/dev/video0 to ", "become DRM master", &pid, "drives this display"])?;
    ensure!(result["probes"][0]["errors"].as_array().is_some_and(|errors| errors.len() == 1), "{result}");
    let camera = camera?;
    camera.json(1)?;
    camera.one_line(1, &["/dev/video0 to null", "the format of /dev/video0"])?;
    both?.one_line(1, &["nosuch"])?;
    let nobody = finish(&mut modules::as_nobody("dmaflow probe"))?;
    nobody.has_status(1)?;
    ensure!(nobody.stderr.contains("error: ") && nobody.stderr.contains("group"), "{}", nobody.stderr);
    PASSED
}

fn without_devices() -> anyhow::Result<Outcome> {
    sh("modprobe -r vivid")?;
    let camera = finish(&mut dmaflow("probe"));
    let pattern = finish(&mut dmaflow("probe --from pattern --to null --json"));
    modules::reload()?;
    camera?.one_line(1, &["a camera", "modprobe vivid"])?;
    pattern?.json(0)?;
    PASSED
}

fn an_order_to_stop() -> anyhow::Result<Outcome> {
    let _witness = Witness::new()?;
    let (settings_before, before) = (settings()?, State::read());
    let mut running = start(&mut dmaflow("probe --json"))?;
    running.wait_until_it_shows()?;
    thread::sleep(Duration::from_millis(100));
    running.signal(Signal::SIGINT)?;
    let run = running.end()?;
    let result = run.json(0)?;
    before.is_back()?;
    ensure!(settings()? == settings_before, "{} instead of {settings_before}", settings()?);
    ensure!(result["stopped"] == true && run.stderr.contains("stopped"), "{result}\n{}", run.stderr);
    ensure!(!result["probes"][0]["formats"][0].is_null(), "{result}");
    PASSED
}
