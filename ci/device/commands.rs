//! `list`, and what the command says of itself and of wrong usage.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::harness::{Outcome, PASSED, Test};
use crate::modules;
use crate::process::{dmaflow, finish, number, pipe};

const NEEDS: &[&str] = &["vivid", "vkms"];

pub const TESTS: &[Test] = &[
    Test { name: "commands::list", needs: NEEDS, seconds: 60, run: list },
    Test {
        name: "commands::list_without_devices",
        needs: &["vivid", "vkms", "root"],
        seconds: 60,
        run: list_without_a_camera,
    },
    Test { name: "commands::defaults_are_named", needs: NEEDS, seconds: 60, run: defaults },
    Test { name: "commands::wrong_usage", needs: NEEDS, seconds: 60, run: wrong_usage },
    Test { name: "commands::result_for_people", needs: NEEDS, seconds: 60, run: result_for_people },
    Test { name: "commands::fields_of_the_result", needs: NEEDS, seconds: 60, run: fields },
];

fn names(list: &Value) -> Vec<&str> {
    list.as_array()
        .map(|list| list.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default()
}

fn list() -> anyhow::Result<Outcome> {
    let run = finish(&mut dmaflow("list --json"))?;
    let list = run.json(0)?;
    ensure!(run.stderr.is_empty(), "{}", run.stderr);
    let cameras = list["cameras"].as_array().context("cameras")?;
    ensure!(cameras.len() == 1 && cameras[0]["driver"] == "vivid" && cameras[0]["path"] == "/dev/video0", "{list}");
    ensure!(cameras[0]["multi_planar"] == false && names(&cameras[0]["inputs"]).len() == 4, "{list}");
    let formats = cameras[0]["formats"].as_array().context("formats")?;
    let xr24 = formats.iter().find(|format| format["format"] == "XR24").context("XR24")?;
    ensure!(
        xr24["sizes"]
            .as_array()
            .is_some_and(|sizes| sizes.iter().any(|size| size["size"] == "640x360")),
        "{xr24}"
    );
    let displays = list["displays"].as_array().context("displays")?;
    let card = modules::card()?.display().to_string();
    ensure!(displays.len() == 1 && displays[0]["driver"] == "vkms" && displays[0]["path"] == card.as_str(), "{list}");
    let connector = &displays[0]["connectors"][0];
    ensure!(connector["name"] == "Virtual-1" && connector["connected"] == true, "{connector}");
    let shared = &list["shared"][0];
    ensure!(shared["camera"] == "/dev/video0" && shared["display"] == card.as_str(), "{shared}");
    let mut expected = names(&displays[0]["formats"]);
    expected.retain(|name| formats.iter().any(|format| format["format"] == *name));
    ensure!(names(&shared["formats"]) == expected && expected.contains(&"XR24"), "{shared} instead of {expected:?}");
    let allocators = list["allocators"].as_array().context("allocators")?;
    ensure!(
        allocators
            .iter()
            .any(|allocator| allocator["node"] == "/dev/udmabuf" && allocator["available"] == true),
        "{list}"
    );
    // For people the same, without a line that says nothing.
    let text = finish(&mut dmaflow("list"))?;
    text.has_status(0)?;
    for word in ["/dev/video0", "vivid", &card, "Virtual-1", "XR24", "1920x1080"] {
        ensure!(text.stdout.contains(word), "no {word} in:\n{}", text.stdout);
    }
    PASSED
}

fn list_without_a_camera() -> anyhow::Result<Outcome> {
    crate::process::sh("modprobe -r vivid")?;
    let list = finish(&mut dmaflow("list --json"));
    let text = finish(&mut dmaflow("list"));
    let pipe = finish(&mut dmaflow("pipe --to vkms --frames 1"));
    let named = finish(&mut dmaflow("pipe --from vivid --to vkms --frames 1"));
    modules::reload()?;
    let list = list?.json(0)?;
    ensure!(list["cameras"] == Value::Array(vec![]) && list["shared"] == Value::Array(vec![]), "{list}");
    ensure!(text?.stdout.contains("none"), "the table does not say that there is no camera");
    let pipe = pipe?;
    // The default display is named first; the failure is the last line.
    pipe.has_status(1)?;
    ensure!(
        pipe.stderr
            .trim_end()
            .lines()
            .last()
            .is_some_and(|line| line.starts_with("error: ") && line.contains("pattern")),
        "{}",
        pipe.stderr
    );
    named?.one_line(1, &["vivid", "modprobe vivid"])?;
    PASSED
}

fn defaults() -> anyhow::Result<Outcome> {
    let run = finish(&mut dmaflow("pipe --frames 2 --json"))?;
    let result = run.json(0)?;
    let card = modules::card()?.display().to_string();
    ensure!(run.stderr.contains("/dev/video0") && run.stderr.contains(&card), "{}", run.stderr);
    ensure!(result["source"] == "/dev/video0" && result["sink"] == card.as_str(), "{result}");
    PASSED
}

fn wrong_usage() -> anyhow::Result<Outcome> {
    for options in [
        "--format nope",
        "--size 640",
        "--size 0x0",
        "--fps 0",
        "--fps -1",
        "--fps nan",
        "--buffers 0",
        "--buffers 65",
        "--frames -1",
        "--frames 1 --seconds 1",
        "--seconds 0",
        "--seconds -1",
        "--path fast",
        "--present now",
        "--corrupt-frame 1",
        "--nosuch",
        "--control brightness",
        "--to y4m:-",
        "--from unix:",
        "--to unix:",
        "--from unix:@",
    ] {
        let run = finish(&mut pipe(options))?;
        run.has_status(2)?;
        ensure!(run.stdout.is_empty() && !run.stderr.is_empty(), "{options}: {:?} {:?}", run.stdout, run.stderr);
    }
    for options in [
        "",
        "nosuch",
        "snap",
        "snap vivid",
        "pipe --from pattern --to null --stride 4096",
        "snap vivid /tmp/x.png --via writeback",
    ] {
        finish(&mut dmaflow(options))?
            .has_status(2)
            .with_context(|| options.to_owned())?;
    }
    // stdout is no place for a picture, and a file called "-" is what nobody means.
    for options in [
        "snap pattern -",
        "snap vkms -",
        "pipe --from pattern --to png:- --frames 1",
        "pipe --from pattern --to vkms --snap - --frames 1",
    ] {
        let run = finish(&mut dmaflow(options))?;
        run.has_status(2).with_context(|| options.to_owned())?;
        ensure!(
            run.stdout.is_empty() && run.stderr.contains("pictures do not go to stdout"),
            "{options}: {}",
            run.stderr
        );
        ensure!(!std::path::Path::new("-").exists(), "{options} wrote a file called \"-\"");
    }
    // A name of nothing, as an unset variable of a shell gives it.
    for options in [["pipe", "--from", ""], ["pipe", "--to", ""], ["probe", "--from", ""], ["snap", "", "/tmp/x.png"]] {
        finish(dmaflow("").args(options))?
            .has_status(2)
            .with_context(|| format!("{options:?}"))?;
    }
    // The case of letters is nothing; a part of a word is.
    finish(&mut dmaflow("pipe --from VIVID --to VKMS --format XR24 --frames 2"))?.has_status(0)?;
    finish(&mut dmaflow("pipe --from i --to vkms"))?.one_line(1, &["a camera called \"i\"", "(vivid)"])?;
    for options in ["--help", "--version", "pipe --help", "list --help", "snap --help"] {
        let run = finish(&mut dmaflow(options))?;
        run.has_status(0)?;
        ensure!(!run.stdout.is_empty() && run.stderr.is_empty(), "{options}");
    }
    PASSED
}

fn result_for_people() -> anyhow::Result<Outcome> {
    let run = finish(&mut dmaflow("pipe --from vivid --to vkms --format XR24 --size 640x360 --frames 5 --verify"))?;
    run.has_status(0)?;
    for word in ["/dev/video0", "/dev/dri/card", "XR24 640x360", "exported", "5 captured", "5 checked, 0 wrong"] {
        ensure!(run.stdout.contains(word), "no {word} in:\n{}", run.stdout);
    }
    ensure!(run.stderr.is_empty(), "stderr is no terminal, yet: {}", run.stderr);
    PASSED
}

/// The contract: these keys are never renamed, and what was not measured is not there.
fn fields() -> anyhow::Result<Outcome> {
    let result = finish(&mut pipe("--format XR24 --size 640x360 --fps 60 --frames 20 --verify"))?.json(0)?;
    let has = |path: &str, is: fn(&Value) -> bool| -> Result<()> {
        let found = path
            .split('/')
            .try_fold(&result, |value, key| value.get(key))
            .with_context(|| format!("no {path} in {result}"))?;
        ensure!(is(found), "{path} is {found}");
        Ok(())
    };
    for path in ["source", "sink", "format", "path"] {
        has(path, Value::is_string)?;
    }
    for path in ["width", "height", "imports", "bytes_copied", "verify/checked", "verify/wrong"] {
        has(path, Value::is_u64)?;
    }
    for count in ["captured", "presented", "dropped_by_camera", "starved", "skipped", "dropped_by_display", "errored"] {
        has(&format!("frames/{count}"), Value::is_u64)?;
    }
    for path in ["seconds", "fps", "cpu_us_per_frame"] {
        has(path, Value::is_number)?;
    }
    for path in ["copies", "refusals"] {
        has(path, Value::is_array)?;
    }
    for part in ["p50", "p99", "max"] {
        has(&format!("latency_us/{part}"), Value::is_u64)?;
    }
    let result = finish(&mut pipe("--format XR24 --frames 1"))?.json(0)?;
    ensure!(result.get("verify").is_none() && result.get("fps").is_none(), "one frame has no rate: {result}");
    let result = finish(&mut pipe("--format XR24 --seconds 0.001"))?.json(0)?;
    ensure!(number(&result, "frames/presented")? == 0, "{result}");
    ensure!(result.get("cpu_us_per_frame").is_none() && result.get("latency_us").is_none(), "of no frame: {result}");
    PASSED
}
