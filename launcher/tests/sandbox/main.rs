//! Real containers, looked at from inside and outside. Needs root.
//!
//! There is no test harness because containers must be cloned from a single-threaded process, as the spawner is.
//! `cargo test --test sandbox NAME` runs the tests whose names contain NAME.
#![allow(missing_docs, unreachable_pub)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)] // a test, though without harness

mod faults;
mod hostile;
mod inside;
mod lab;
mod notify;
mod outside;
mod probe;

macro_rules! tests {
    ($($module:ident::$name:ident,)*) => { &[$((stringify!($name), $module::$name)),*] };
}

const TESTS: &[(&str, fn())] = tests![
    inside::the_first_process_is_alone_in_its_own_world,
    inside::root_inside_has_nine_capabilities_over_its_own_ids_and_no_way_to_more,
    inside::an_ordinary_user_has_its_groups_and_home_and_no_capability,
    inside::forbidden_calls_fail_with_the_documented_error,
    inside::a_user_without_capabilities_binds_port_80_and_its_listen_is_announced,
    inside::the_image_belongs_to_the_containers_ids,
    inside::writing_changes_the_upper_layer_only_and_ends_with_it,
    inside::the_writable_layer_and_shared_memory_are_limited,
    inside::a_higher_layer_covers_a_lower_one,
    inside::standard_output_can_be_reopened_by_an_ordinary_user,
    inside::files_that_the_image_lacks_are_provided_and_what_it_has_stays,
    hostile::an_image_whose_standard_directories_are_links_is_refused,
    hostile::links_in_etc_lead_nowhere,
    hostile::account_files_are_read_with_care,
    hostile::volumes_are_written_or_not_as_planned_and_show_the_containers_ids,
    hostile::a_volume_that_knows_no_id_mapping_shows_the_hosts_ids_and_obeys_them,
    hostile::volume_targets_do_not_leave_the_root,
    hostile::a_volumes_own_links_do_not_move_the_next_volume_out,
    hostile::every_failure_names_its_step_and_error,
    faults::every_step_fails_with_every_error_and_leaves_nothing,
    outside::nothing_is_left_after_a_container_nor_after_a_failed_one,
    outside::the_hosts_mounts_do_not_appear_inside_later,
    outside::cgroups_of_v1_are_joined_and_are_the_root_of_the_view,
    outside::a_cgroup_of_v2_is_entered_by_the_clone_itself,
    outside::a_spawner_with_many_descriptors_makes_containers_with_few,
    outside::many_containers_share_one_prepared_user_namespace,
    outside::a_half_made_container_does_not_outlive_its_spawner,
    outside::where_no_listener_can_be_had_the_container_runs_without,
];

fn main() {
    let mut arguments = std::env::args();
    let name = arguments.next().unwrap_or_default();
    let wanted = arguments.find(|argument| !argument.starts_with('-'));
    match wanted.as_deref() {
        // In a container there is only this program, under this name.
        Some(part) if name == "probe" || name == "/bin/probe" => probe::run(part),
        Some("beneath_a_listener") => outside::beneath_a_listener(),
        Some("measure") => measure(),
        wanted => run(wanted),
    }
}

fn run(wanted: Option<&str>) {
    assert!(rustix::process::geteuid().is_root(), "these tests make containers: run them as root");
    // What tests mount, the machine does not see.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    let mut failed = Vec::new();
    for (name, test) in TESTS.iter().filter(|(name, _)| wanted.is_none_or(|part| name.contains(part))) {
        let result = std::panic::catch_unwind(test);
        println!("test {name} ... {}", if result.is_ok() { "ok" } else { "FAILED" });
        if result.is_err() {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// How long a start takes, step by step; run by hand with `cargo test --test sandbox measure`.
fn measure() {
    const RUNS: usize = 200;
    let image = lab::Image::new();
    for directory in ["proc", "dev", "sys", "tmp", "run"] {
        std::fs::create_dir(image.path().join(directory)).unwrap();
    }
    std::process::Command::new("chmod").arg("1777").arg(image.path().join("tmp")).status().unwrap();
    let userns = launcher::sandbox::UserNs::new(lab::ID_BASE).unwrap();
    let container = lab::Container::new(&image, &["/bin/busybox", "true"]);
    let median = |mut values: Vec<u128>| {
        values.sort_unstable();
        (values[values.len() / 2], values[values.len() * 99 / 100])
    };
    // Back to back, and with pauses in which processors fall asleep and caches cool down.
    for pause in [0, 10] {
        let one = |_| {
            std::thread::sleep(std::time::Duration::from_millis(pause));
            container.run_in(&userns)
        };
        let outcomes: Vec<_> = (0..RUNS).map(one).collect();
        let total = median(outcomes.iter().map(|outcome| outcome.to_exec.as_micros()).collect());
        println!("start to exec, {pause} ms between: {total:?} us (median, p99)");
        for (index, step) in outcomes[0].timings.iter().enumerate() {
            let values = outcomes.iter().map(|outcome| outcome.timings[index].us.into()).collect();
            println!("{:>30} {:?}", step.step, median(values));
        }
    }
}
